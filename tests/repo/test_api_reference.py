"""The reference of the custom resource is what its models say."""

from __future__ import annotations

import re

from resilientllm_api import crd
from resilientllm_api.crd_schema import openapi_schema

from tools.api_reference import DOCUMENT, render


def test_it_is_not_stale() -> None:
    assert DOCUMENT.read_text() == render(), "docs/api.md is stale: run `make generate`"


def test_it_has_every_field_of_the_crd() -> None:
    def names(node: object) -> set[str]:
        if isinstance(node, list):
            return {name for each in node for name in names(each)}
        if not isinstance(node, dict):
            return set()
        found = set(node["properties"]) if isinstance(node.get("properties"), dict) else set()
        return found.union(*(names(each) for each in node.values()))

    parts = openapi_schema()["properties"]
    shown = set(re.findall(r"^\| `(\w+)` \| ", render(), re.MULTILINE))

    assert len(names(parts)) > 100
    assert names(parts) - shown == set()


def test_it_explains_what_values_mean() -> None:
    for kind in (crd.InstancePhase, crd.ConditionType, crd.FailureCause):
        for value in kind:
            assert re.search(rf"^\| `{value}` \| .{{10,}} \|$", render(), re.MULTILINE), value
