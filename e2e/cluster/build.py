"""Kubernetes and etcd from their Go modules, since there is no registry to pull them from.

The result is kept outside the checkout under a hash of everything it is made of, so a second run
costs nothing, and a half-built folder is never taken for a whole one: it is renamed into place.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from .commands import run
from .errors import ClusterError
from .packages import install

MODULE = Path(__file__).parent / "hyper"
HELM_MODULE = Path(__file__).parent / "helm"
"""Requires the Kubernetes libraries in the version of ``hyper``, so that most of Helm is compiled already."""
PERSONALITIES = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "kubectl",
)

_GO_MINIMUM = (1, 26)
_BUILD_TIMEOUT_SECONDS = 3600.0


def cache_root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "resilientllm" / "cluster"


def fingerprint(sources: Iterable[Path], go_version: str) -> str:
    """Names a build by the content of its sources and the compiler."""
    digest = hashlib.sha256(go_version.encode())
    for source in sorted(sources):
        digest.update(b"\0" + source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def kubernetes_version(go_mod: str) -> str:
    """The version of Kubernetes, such as ``v1.36.3``, that a ``go.mod`` requires."""
    return _required(go_mod, "k8s.io/kubernetes")


def helm_ldflags(go_mod: str) -> str:
    """Helm's own Makefile sets these; without them, charts are rendered for Kubernetes 1.20."""
    _, minor, _ = _required(go_mod, "k8s.io/client-go").split(".")
    package = "helm.sh/helm/v3"
    variables = {
        f"{package}/internal/version.version": _required(go_mod, package),
        **{f"{package}/pkg/{each}.k8sVersionMajor": "1" for each in ("chartutil", "lint/rules")},
        **{f"{package}/pkg/{each}.k8sVersionMinor": minor for each in ("chartutil", "lint/rules")},
    }
    return " ".join(["-s -w", *(f"-X {name}={value}" for name, value in variables.items())])


def _required(go_mod: str, module: str) -> str:
    for line in go_mod.splitlines():
        words = line.removeprefix("require ").split()
        if words[:1] == [module]:
            return words[1]
    raise ClusterError(
        expected=f"a line `{module} v…` in go.mod",
        found="none",
        remedy="restore the file from version control",
    )


def go_program() -> str:
    """The Go compiler; Debian's own is the fallback on a machine that has none."""
    program = shutil.which("go")
    if program is None:
        install(["golang-go"])
        program = shutil.which("go")
    found = run(program or "go", "env", "GOVERSION").strip()
    numbers = found.removeprefix("go").split(".")
    if tuple(int(part) for part in numbers[:2] if part.isdigit()) < _GO_MINIMUM:
        raise ClusterError(
            expected="Go " + ".".join(map(str, _GO_MINIMUM)) + " or newer",
            found=f"{program} is {found}",
            remedy="install a newer Go and put it first on PATH",
        )
    return program or "go"


def binaries() -> Path:
    """A folder with etcd, pause and every Kubernetes program; built on first use (minutes)."""
    return _built("kubernetes", _build)


def kind_tools() -> Path:
    """A folder with kind and kubeadm, of which only clusters made by kind have need."""
    return _built("kind", _build_kind_tools)


def helm() -> Path:
    """The program ``helm``; built on first use."""
    return _built("helm", _build_helm, HELM_MODULE) / "helm"


def _built(name: str, build: Callable[[str, Path], None], module: Path = MODULE) -> Path:
    go = go_program()
    version = run(go, "version").strip()
    sources = [module / "go.mod", module / "go.sum", *module.rglob("*.go")]
    home = cache_root() / f"{name}-{fingerprint(sources, version)}"
    if not home.exists():
        cached(home, lambda folder: build(go, folder))
    return home


def cached(home: Path, make: Callable[[Path], None]) -> None:
    """Let ``make`` fill a new folder, and put it at ``home`` only when it is complete."""
    home.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=home.parent))
    try:
        make(unfinished)
        unfinished.chmod(0o755)
        try:
            unfinished.rename(home)
        except OSError:
            # Another run finished first: its folder has the same content by construction.
            if not home.exists():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def go_build(go: str, module: Path, package: str, output: Path, *, ldflags: str = "-s -w") -> None:
    run(
        *("nice", go, "build", "-mod=readonly", "-trimpath", "-buildvcs=false"),
        *("-ldflags", ldflags, "-o", output, package),
        cwd=module,
        env=_build_environment(os.environ),
        timeout_seconds=_BUILD_TIMEOUT_SECONDS,
    )


def _build(go: str, folder: Path) -> None:
    go_build(go, MODULE, "./pause", folder / "pause")
    go_build(go, MODULE, "go.etcd.io/etcd/server/v3", folder / "etcd")
    go_build(go, MODULE, ".", folder / "hyper", ldflags=_versioned())
    for name in PERSONALITIES:
        (folder / name).symlink_to("hyper")


def _build_kind_tools(go: str, folder: Path) -> None:
    go_build(go, MODULE, "sigs.k8s.io/kind", folder / "kind")
    go_build(go, MODULE, "k8s.io/kubernetes/cmd/kubeadm", folder / "kubeadm", ldflags=_versioned())


def _build_helm(go: str, folder: Path) -> None:
    ldflags = helm_ldflags((HELM_MODULE / "go.mod").read_text())
    go_build(go, HELM_MODULE, "helm.sh/helm/v3/cmd/helm", folder / "helm", ldflags=ldflags)


def _versioned() -> str:
    # Without a version the programs report v0.0.0, and refuse to work with one another.
    version = kubernetes_version((MODULE / "go.mod").read_text())
    return f"-s -w -X k8s.io/component-base/version.gitVersion={version}"


def _build_environment(environment: Mapping[str, str]) -> dict[str, str]:
    # Static binaries run in any root filesystem; a workspace file of the user must not take part.
    return {**environment, "CGO_ENABLED": "0", "GOWORK": "off"}
