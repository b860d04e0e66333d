"""Writes docs/api.md from the models of the custom resource (`make generate`): one section for each type.

The same docstrings are in the CRD, where `kubectl explain` shows them field by field; what values of enumerations mean
is only here.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from resilientllm_api import crd, engine_state, plan

DOCUMENT = Path(__file__).parents[1] / "docs" / "api.md"

Schema = Mapping[str, Any]

_HEAD = f"""\
# API reference

Generated from the code by `make generate`; a test fails when this page is stale. The custom resource is `{crd.KIND}` of
`{crd.API_VERSION}`, short name `{crd.SHORT_NAME}`. What to do with it is in [kubernetes.md](kubernetes.md); reasons of
conditions are [there](kubernetes.md#reasons-and-what-to-do), too. Fields without default that are not marked *required*
may be left out.
"""
_REFERENCE = "#/$defs/"


def render() -> str:
    raw = crd.ResilientLLM.model_json_schema(by_alias=True)
    types: Schema = raw["$defs"]
    sections = [_HEAD, _section(crd.KIND, {**raw, "properties": _without(raw["properties"], "metadata")})]
    sections += [_section(name, types[name]) for name in _reached(raw, types)]
    sections.append(f"## {crd.ConditionType.__name__}\n\nThe types of conditions.\n")
    return "\n".join([*sections, _values(crd.ConditionType)])


def _without(properties: Schema, name: str) -> Schema:
    return {key: value for key, value in properties.items() if key != name}


def _reached(schema: Schema, types: Schema) -> list[str]:
    """Names of the types that a schema refers to, each after the first that does."""
    found: list[str] = []

    def visit(node: Schema) -> None:
        for name in _references(node):
            if name not in found:
                found.append(name)
                visit(types[name])

    visit(_without(schema, "$defs"))
    return found


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if "$ref" in node:
            yield str(node["$ref"]).removeprefix(_REFERENCE)
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


def _section(name: str, schema: Schema) -> str:
    parts = [f"## {name}\n"]
    if words := _text(schema.get("description", "")):
        parts.append(f"{words}\n")
    parts.append(_values(_enumeration(name)) if "enum" in schema else _fields(schema))
    rules = [_text(each["message"]) for each in schema.get("x-kubernetes-validations", ())]
    if rules:
        parts.append("The API server refuses what breaks a rule:\n\n" + "\n".join(f"- {each}" for each in rules) + "\n")
    return "\n".join(parts)


def _fields(schema: Schema) -> str:
    required = set(schema.get("required", ()))
    rows = []
    for name, field in schema["properties"].items():
        default = "*required*" if name in required else _default(field.get("default"))
        rows.append(f"| `{name}` | {_type(field)} | {default} | {_text(field.get('description', ''))} |")
    return "\n".join(["| field | type | default | what |", "|---|---|---|---|", *rows]) + "\n"


def _type(field: Schema) -> str:
    if "$ref" in field:
        name = str(field["$ref"]).removeprefix(_REFERENCE)
        return f"[{name}](#{name.lower()})"
    if field.get("x-kubernetes-int-or-string"):
        return "quantity"
    if "anyOf" in field:
        (only,) = [option for option in field["anyOf"] if option.get("type") != "null"]
        return _type(only)
    if "enum" in field:
        return ", ".join(f"`{each}`" for each in field["enum"])
    match field.get("type"):
        case "array":
            return f"list of {_type(field['items'])}{_bounds(field, 'Items')}"
        case "object":
            values = field.get("additionalProperties")
            return f"map of {_type(values)}{_bounds(field, 'Properties')}" if isinstance(values, Mapping) else "object"
        case "string":
            return "time" if field.get("format") == "date-time" else "string"
        case "integer" | "number" as kind:
            lowest, highest = field.get("minimum"), field.get("maximum")
            return f"{kind}, {lowest} to {highest}" if None not in (lowest, highest) else str(kind)
        case "boolean":
            return "boolean"
        case other:
            raise ValueError(f"expected a type that this page can name, found {other!r} in {dict(field)}")


def _bounds(field: Schema, what: str) -> str:
    return f", at most {field[f'max{what}']}" if f"max{what}" in field else ""


def _default(value: Any) -> str:
    """An object's own defaults are those of its fields."""
    if value in (None, "") or isinstance(value, Mapping | list):
        return ""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _enumeration(name: str) -> type[StrEnum]:
    kind: type[StrEnum] = next(getattr(module, name) for module in (crd, engine_state, plan) if hasattr(module, name))
    return kind


def _values(kind: type[StrEnum]) -> str:
    """With the docstrings under the members, which Python throws away."""
    (parsed,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(parsed, ast.ClassDef)
    explained: dict[str, str] = {}
    member: str | None = None
    for line in parsed.body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            member = line.targets[0].id
        elif isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and member is not None:
            explained[member] = str(line.value.value)
    rows = [f"| `{each}` | {_text(explained.get(each.name, ''))} |" for each in kind]
    return "\n".join(["| value | what |", "|---|---|", *rows]) + "\n"


def _text(words: str) -> str:
    """In one line, as a table wants it."""
    return " ".join(words.replace("``", "`").split()).replace("|", "\\|")


def main() -> int:
    DOCUMENT.write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
