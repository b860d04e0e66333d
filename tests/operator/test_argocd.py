"""The health check of Argo CD, run by a real Lua over objects as the operator leaves them.

``manifests/argocd/resilientllm.dev`` is laid out like ``resource_customizations`` in the repository of Argo CD, and
this file does what the test there does (``util/lua/health_test.go``). The Lua is 5.1, the language of its gopher-lua.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from lupa.lua51 import LuaRuntime
from resilientllm_api.crd import GROUP, KIND, PLURAL

from tests.operator.recorded import objects, text_of

ARGO_CD = Path(__file__).parents[2] / "manifests" / "argocd"
CUSTOMIZATION = ARGO_CD / GROUP / KIND
OBJECTS = list(objects())
SCRIPT = (CUSTOMIZATION / "health.lua").read_text()
TESTS = yaml.safe_load((CUSTOMIZATION / "health_test.yaml").read_text())["tests"]
NOT_GIVEN = ("string", "math", "io", "coroutine", "debug", "python")
"""What Argo CD does not open for scripts of its ConfigMap (``util/lua/lua.go``), and what the host adds here."""


def run(script: str, manifest: dict[str, Any]) -> dict[str, str]:
    lua = LuaRuntime(unpack_returned_tuples=True)
    for library in NOT_GIVEN:
        lua.globals()[library] = None
    lua.globals().obj = lua.table_from(manifest, recursive=True)
    return dict(lua.execute(script))


@pytest.mark.parametrize("case", TESTS, ids=lambda case: Path(case["inputPath"]).stem)
def test_health_is(case: dict[str, Any]) -> None:
    manifest = yaml.safe_load((CUSTOMIZATION / case["inputPath"]).read_text())

    assert run(SCRIPT, manifest) == case["healthStatus"]


def test_every_recorded_object_is_tested_and_every_health_occurs() -> None:
    kept = {path.name for path in (CUSTOMIZATION / "testdata").iterdir()}

    assert kept == {f"{name}.yaml" for name, _ in OBJECTS}
    assert {case["inputPath"] for case in TESTS} == {f"testdata/{name}" for name in kept}
    assert {case["healthStatus"]["status"] for case in TESTS} == {"Healthy", "Progressing", "Degraded", "Suspended"}


@pytest.mark.parametrize(("name", "manifest"), OBJECTS)
def test_the_objects_are_what_the_operator_says_today(name: str, manifest: dict[str, Any]) -> None:
    kept = (CUSTOMIZATION / "testdata" / f"{name}.yaml").read_text()

    assert kept == text_of(manifest), "run python -m tests.operator.recorded, and look at what changed"


def serves(manifest: dict[str, Any]) -> bool:
    return {"Available": "True"}.items() <= {
        each["type"]: each["status"] for each in manifest["status"].get("conditions", [])
    }.items()


@pytest.mark.parametrize(("name", "manifest"), OBJECTS)
def test_what_serves_is_red_only_if_the_spec_does_not_work(name: str, manifest: dict[str, Any]) -> None:
    if serves(manifest) and name not in ("roll-out-stopped", "spec-unreadable"):
        assert run(SCRIPT, manifest)["status"] != "Degraded"


def test_an_object_without_status_is_progressing() -> None:
    manifest = dict(OBJECTS)["healthy"]
    del manifest["status"]

    assert run(SCRIPT, manifest)["status"] == "Progressing"


def test_the_config_map_has_the_script_under_the_key_that_argo_cd_looks_for() -> None:
    kustomization = yaml.safe_load((ARGO_CD / "kustomization.yaml").read_text())
    (generated,) = kustomization["configMapGenerator"]

    assert generated["name"] == "argocd-cm"
    assert generated["files"] == [
        f"resource.customizations.health.{GROUP}_{KIND}={GROUP}/{KIND}/health.lua",
    ]


def test_the_application_gets_along_with_an_operator_that_is_being_installed() -> None:
    """The CRD may not be there when the objects are compared first."""
    applications = list(yaml.safe_load_all((ARGO_CD / "application.yaml").read_text()))
    operator, models = applications

    for each in applications:
        assert "ServerSideApply=true" in each["spec"]["syncPolicy"]["syncOptions"]
    assert "SkipDryRunOnMissingResource=true" in models["spec"]["syncPolicy"]["syncOptions"]
    assert [each["metadata"]["annotations"]["argocd.argoproj.io/sync-wave"] for each in applications] == ["0", "1"]
    assert operator["spec"]["source"]["path"] == "manifests/base"
    assert PLURAL not in yaml.safe_dump(operator["spec"].get("ignoreDifferences", []))
