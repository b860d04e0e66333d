"""Generates the CustomResourceDefinition from the classes in :mod:`resilientllm_api.crd`.

pydantic writes JSON Schema; the API server takes a *structural* schema: no references, no ``anyOf`` with null, no
titles. This module is the difference between the two.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from resilientllm_api import crd

Schema = dict[str, Any]

CRD_FILE = f"{crd.GROUP}_{crd.PLURAL}.yaml"
_HEADER = "# Generated from resilientllm_api.crd by `make generate`. Do not edit.\n"
_DROPPED = {"title", "$defs", "additionalProperties", "const"}


def structural(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> Schema:
    """The structural form of one node of a JSON Schema, references resolved from ``defs``."""
    if "$ref" in schema:
        target = defs[str(schema["$ref"]).removeprefix("#/$defs/")]
        # What is said beside a reference (the field's own description and default) outweighs the class's.
        return structural({**target, **{key: value for key, value in schema.items() if key != "$ref"}}, defs)
    if schema.get("x-kubernetes-int-or-string"):
        return {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "pattern": schema["pattern"],
            "x-kubernetes-int-or-string": True,
        }
    if "anyOf" in schema:
        # ``X | None``: the field is optional, and null is not a value of its own.
        (only,) = [option for option in schema["anyOf"] if option.get("type") != "null"]
        rest = {key: value for key, value in schema.items() if key not in ("anyOf", "default")}
        return structural({**only, **rest}, defs)

    result: Schema = {key: value for key, value in schema.items() if key not in _DROPPED}
    if "description" in result:
        result["description"] = " ".join(str(result["description"]).replace("``", "").split())
    if "properties" in result:
        result["properties"] = {name: structural(value, defs) for name, value in result["properties"].items()}
    if "items" in result:
        result["items"] = structural(result["items"], defs)
    if isinstance(schema.get("additionalProperties"), Mapping):
        result["additionalProperties"] = structural(schema["additionalProperties"], defs)
    default = without_empty(result.pop("default", None))
    if default is not None and default != []:
        result["default"] = default
    if result.get("type") == "integer":
        result["format"] = "int64"
    if result.get("type") == "number":
        result["format"] = "double"
    return result


def without_empty(default: Any) -> Any:
    """A default without the members that say nothing: the API server refuses null where an object is wanted."""
    if isinstance(default, Mapping):
        members = {key: without_empty(value) for key, value in default.items()}
        return {key: value for key, value in members.items() if value is not None and value != []}
    return default


def openapi_schema() -> Schema:
    """The schema of the whole object. ``metadata`` is the API server's."""
    raw = crd.ResilientLLM.model_json_schema(by_alias=True)
    schema = structural(raw, raw["$defs"])
    schema["description"] = str(crd.ResilientLLM.__doc__).splitlines()[0]
    schema["properties"] = {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object"},
        "spec": schema["properties"]["spec"],
        "status": schema["properties"]["status"],
    }
    # kstatus takes an object for complete that says nothing of what was observed: here, until the operator has seen it.
    schema["properties"]["status"]["default"] = {"observedGeneration": crd.NOTHING_OBSERVED}
    schema["required"] = ["spec"]
    return schema


def _condition(kind: crd.ConditionType, field: str) -> str:
    return f'.status.conditions[?(@.type=="{kind}")].{field}'


def _column(name: str, path: str, kind: str = "string", priority: int = 0, description: str = "") -> Schema:
    column: Schema = {"name": name, "type": kind, "jsonPath": path}
    if description:
        column["description"] = description
    return column | ({"priority": priority} if priority else {})


def custom_resource_definition() -> Schema:
    ready, degraded, replication = (
        crd.ConditionType.READY,
        crd.ConditionType.DEGRADED,
        crd.ConditionType.REPLICATION_HEALTHY,
    )
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{crd.PLURAL}.{crd.GROUP}",
            "labels": {"app.kubernetes.io/name": "resilientllm", "app.kubernetes.io/part-of": "resilientllm"},
        },
        "spec": {
            "group": crd.GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": crd.KIND,
                "listKind": f"{crd.KIND}List",
                "plural": crd.PLURAL,
                "singular": crd.SINGULAR,
                "shortNames": [crd.SHORT_NAME],
                "categories": ["all", "inference"],
            },
            "versions": [
                {
                    "name": crd.VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": openapi_schema()},
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [
                        _column("Ready", _condition(ready, "status")),
                        _column("Reason", _condition(ready, "reason")),
                        _column("Instances", ".status.ready", description="Instances that serve, of those asked for"),
                        _column("Degraded", _condition(degraded, "status")),
                        _column("Last Recovery", ".status.lastRecovery.took", description="How long it took"),
                        _column("Replication", _condition(replication, "reason"), priority=1),
                        _column("Endpoint", ".status.endpoint", priority=1),
                        _column("Message", _condition(ready, "message"), priority=1),
                        _column("Age", ".metadata.creationTimestamp", kind="date"),
                    ],
                }
            ],
        },
    }


class _Dumper(yaml.SafeDumper):
    """Writes every value out: YAML anchors are legal, and nobody wants to review them."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def render() -> str:
    return _HEADER + yaml.dump(custom_resource_definition(), Dumper=_Dumper, sort_keys=False, width=120)


def main() -> int:
    """``resilientllm-generate-crd [FOLDER]``: writes the file into FOLDER (default: ``crds``)."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "crds")
    if not folder.is_dir():
        print(f"resilientllm-generate-crd: {folder} is not a folder; run it from the root of the repository")
        return 2
    (folder / CRD_FILE).write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
