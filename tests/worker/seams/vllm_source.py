"""vLLM's source as text and trees, for contracts about code that cannot be imported or run here."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path


@functools.cache
def root() -> Path:
    """Where vLLM is installed; found without importing it."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


@functools.cache
def tree(path: str) -> ast.Module:
    file = root() / path
    assert file.is_file(), f"vLLM has no {path} any more: look at the seam that this contract is about"
    return ast.parse(file.read_text())


@functools.cache
def mentions(path: str, text: str) -> bool:
    """Parsing hundreds of models takes long; most have no word of what is looked for."""
    return text in (root() / path).read_text()


def class_of(path: str, name: str) -> ast.ClassDef:
    found = [node for node in tree(path).body if isinstance(node, ast.ClassDef) and node.name == name]
    assert found, f"vLLM's {path} has no class {name} any more"
    return found[0]


def methods(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}


def source_of(path: str, class_name: str, method: str) -> str:
    found = methods(class_of(path, class_name)).get(method)
    assert found is not None, f"vLLM's {class_name} in {path} has no {method} any more"
    return ast.unparse(found)


def parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    return [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs) if each.arg != "self"]


def attributes_of(path: str, *owners: str) -> set[str]:
    """Names that follow a dot behind one of ``owners``, given as source: ``self.pp_handler``, ``get_pp_group()``."""
    if not any(mentions(path, owner) for owner in owners):
        return set()
    nodes = (node for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute))
    return {node.attr for node in nodes if ast.unparse(node.value) in owners}


def names_imported_by(path: str) -> set[str]:
    return {
        alias.asname or alias.name
        for node in tree(path).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }


def files_under(folder: str) -> Iterator[str]:
    for file in sorted((root() / folder).rglob("*.py")):
        yield str(file.relative_to(root()))
