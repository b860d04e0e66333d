"""The rules of fencing, each with one thing wrong: a guard that always or never holds or is off by one, a change to the
state or an order to the server that is forgotten. Found in the source, so a new guard has its mutants by itself.
"""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Iterator
from types import ModuleType

from resilientllm_worker.protocol import fencing

_OFF_BY_ONE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}


def mutants() -> Iterator[tuple[str, ModuleType]]:
    """Each with its name: where, and what is wrong."""
    source = inspect.getsource(fencing)
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name != "next_term"]
    for function in functions:
        for node, wrong in _changes(function):
            original = copy.copy(node)
            line = ast.unparse(original)
            _become(node, wrong)
            yield f"{function.name}: {line} becomes {ast.unparse(node)}", _module(tree)
            _become(node, original)


def _changes(function: ast.FunctionDef) -> Iterator[tuple[ast.AST, ast.AST]]:
    for guard in _guards(function):
        yield guard, ast.Constant(True)
        yield guard, ast.Constant(False)
        if isinstance(guard, ast.Compare) and type(guard.ops[0]) in _OFF_BY_ONE:
            yield guard, ast.Compare(guard.left, [_OFF_BY_ONE[type(guard.ops[0])]()], guard.comparators)
    for node in list(ast.walk(function)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "_replace":
            for place in range(len(node.keywords)):
                yield node, ast.Call(node.func, node.args, node.keywords[:place] + node.keywords[place + 1 :])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Verdict":
            for place in range(1, len(node.args)):
                nothing: ast.expr = ast.Tuple([], ast.Load()) if place == 1 else ast.Constant(False)
                yield node, ast.Call(node.func, [*node.args[:place], nothing, *node.args[place + 1 :]], node.keywords)
            if node.keywords:
                yield node, ast.Call(node.func, node.args, [])


def _guards(function: ast.FunctionDef) -> list[ast.expr]:
    """All that is decided on, in its smallest parts."""
    guards: list[ast.expr] = []
    returns_bool = isinstance(function.returns, ast.Name) and function.returns.id == "bool"
    for node in ast.walk(function):
        if isinstance(node, ast.If | ast.IfExp):
            guards += _parts(node.test)
        elif isinstance(node, ast.comprehension):
            guards += [part for each in node.ifs for part in _parts(each)]
        elif isinstance(node, ast.Return | ast.Assign) and (returns_bool or isinstance(node.value, ast.Compare)):
            guards += _parts(node.value) if node.value is not None else []
    return guards


def _parts(test: ast.expr) -> list[ast.expr]:
    if isinstance(test, ast.BoolOp):
        return [part for value in test.values for part in _parts(value)]
    return _parts(test.operand) if isinstance(test, ast.UnaryOp) else [test]


def _become(node: ast.AST, other: ast.AST) -> None:
    """In place, so that whatever has ``node`` in it has ``other``."""
    node.__class__ = other.__class__
    node.__dict__ = copy.copy(other.__dict__)


def _module(tree: ast.Module) -> ModuleType:
    module = ModuleType("mutant")
    module.__dict__["__name__"] = fencing.__name__
    exec(compile(ast.fix_missing_locations(copy.deepcopy(tree)), "mutant", "exec"), module.__dict__)
    return module
