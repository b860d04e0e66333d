"""The cache of built programs."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.cluster.build import HELM_MODULE, MODULE, cached, fingerprint, helm_ldflags, kubernetes_version
from e2e.cluster.errors import ClusterError


def test_fingerprint_follows_sources_and_compiler(tmp_path: Path) -> None:
    source = tmp_path / "main.go"
    source.write_text("package main")
    before = fingerprint([source], "go1")

    assert fingerprint([source], "go1") == before
    assert fingerprint([source], "go2") != before
    source.write_text("package other")
    assert fingerprint([source], "go1") != before


def test_version_is_read_from_the_module_that_is_built() -> None:
    assert kubernetes_version((MODULE / "go.mod").read_text()).startswith("v1.36.")


def test_helm_renders_for_the_kubernetes_that_is_built() -> None:
    helm = HELM_MODULE.joinpath("go.mod").read_text()
    minor = kubernetes_version((MODULE / "go.mod").read_text()).split(".")[1]

    assert f"-X helm.sh/helm/v3/pkg/chartutil.k8sVersionMinor={minor} " in helm_ldflags(helm)


def test_module_without_kubernetes_is_an_error() -> None:
    with pytest.raises(ClusterError, match=r"k8s\.io/kubernetes"):
        kubernetes_version("module x\n")


def test_failed_build_leaves_nothing_that_could_be_taken_for_a_whole_one(tmp_path: Path) -> None:
    home = tmp_path / "cache" / "build"

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("compiler crashed")

    with pytest.raises(RuntimeError):
        cached(home, fail)

    assert list(home.parent.iterdir()) == []


def test_build_that_another_run_finished_first_is_kept(tmp_path: Path) -> None:
    home = tmp_path / "build"

    def make_while_another_finishes(folder: Path) -> None:
        (folder / "program").write_text("mine")
        home.mkdir()
        (home / "program").write_text("theirs")

    cached(home, make_while_another_finishes)

    assert (home / "program").read_text() == "theirs"
    assert [entry.name for entry in tmp_path.iterdir()] == ["build"]
