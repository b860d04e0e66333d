"""A node image for kind, made here from Debian's packages and the programs that we built.

kind's own comes from a registry. This one follows its recipe: kind's files lie in kind's Go module.
Left out are the network daemon and the name server, for which `kind.Docker.own_pod_network` stands in.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

from . import build
from .commands import run
from .errors import ClusterError
from .image import Entry, File, Folder, Image, Link, pause_image, with_parents, write_archive
from .kind import Docker
from .machine import SHIELDED_SYSCTLS
from .packages import install

REF = "resilientllm/kind-node:dev"

_DEBIAN_PACKAGES = (
    "systemd",
    "systemd-sysv",
    "dbus",
    "containerd",
    "runc",
    "containernetworking-plugins",
    "iptables",
    "nftables",
    "iproute2",
    "conntrack",
    "ethtool",
    "kmod",
    "procps",
    "jq",
    "ca-certificates",
)
_CONTROL_PLANE = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "etcd")

# As kind's recipe has them: a node must not start what belongs to a whole machine.
_UNWANTED_UNITS = (
    "lib/systemd/system/multi-user.target.wants/*",
    "etc/systemd/system/*.wants/*",
    "lib/systemd/system/local-fs.target.wants/*",
    "lib/systemd/system/sockets.target.wants/*udev*",
    "lib/systemd/system/sockets.target.wants/*initctl*",
    "lib/systemd/system/basic.target.wants/*",
    "lib/systemd/system/sysinit.target.wants/systemd-tmpfiles-setup.service",
    # Debian's own would win over kind's, which is the one that is made for a container.
    "lib/systemd/system/containerd.service",
)
_MASKED_UNITS = (
    "systemd-binfmt.service",
    "systemd-udevd.service",
    "systemd-udev-trigger.service",
    "proc-sys-fs-binfmt_misc.automount",
    "proc-sys-fs-binfmt_misc.mount",
)
_ENABLED_UNITS = ("kubelet.service", "containerd.service", "undo-mount-hacks.service")

_STORAGE_CLASS = {
    "apiVersion": "storage.k8s.io/v1",
    "kind": "StorageClass",
    "metadata": {"name": "standard", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
    "provisioner": "kubernetes.io/host-path",
}

# Settings of the kernel hold for all containers, so a node gets them read-only, and sees the values
# that its kubelet insists on. Without a name for the host, kind's entrypoint waits for a name server.
_SHIELD = """\
#!/bin/bash
set -e
for part in kernel vm fs; do
  mount --bind /proc/sys/$part /proc/sys/$part
  mount -o remount,ro,bind /proc/sys/$part
done
{binds}
echo "$(ip -4 route show default | cut -d' ' -f3) host.docker.internal" >> /etc/hosts
exec /usr/local/bin/entrypoint "$@"
"""
# systemd would else use the machine's second version of control groups beside the first.
_ENTRYPOINT = [
    "/usr/local/bin/shield",
    "/sbin/init",
    "systemd.unified_cgroup_hierarchy=0",
    "systemd.legacy_systemd_cgroup_controller=1",
]

_IMPORT_IMAGES = """\
[Service]
ExecStartPost=/usr/bin/ctr --namespace=k8s.io images import /kind/images.tar
"""


def load(docker: Docker) -> str:
    """Give a Docker daemon the node image, making it first if need be (minutes); its reference."""
    changes = ["ENV container=docker", f"ENTRYPOINT {json.dumps(_ENTRYPOINT)}"]
    options = [option for change in changes for option in ("--change", change)]
    docker.run("import", *options, str(root_archive()), REF, timeout_seconds=300)
    return REF


def root_archive() -> Path:
    """A tar of the node's root file system."""
    tools, binaries = build.kind_tools(), build.binaries()
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    home = build.cache_root() / f"kind-node-{recipe}-{binaries.name}"

    def make(folder: Path) -> None:
        root = folder / "root"
        run("cp", "--archive", _debian(), root, timeout_seconds=300)
        _furnish(root, tools, binaries)
        run("tar", "--create", f"--file={folder / 'root.tar'}", f"--directory={root}", ".", timeout_seconds=300)
        shutil.rmtree(root)

    if not home.exists():
        build.cached(home, make)
    return home / "root.tar"


def _debian() -> Path:
    """A small Debian with systemd and containerd, of the release and from the mirror of this machine."""
    release = re.search(r"^VERSION_CODENAME=(\w+)$", Path("/etc/os-release").read_text(), re.MULTILINE)
    if release is None or shutil.which("apt-get") is None:
        raise ClusterError(
            expected="a Debian machine", found="another", remedy="use an ordinary Docker, for which kind has an image"
        )
    recipe = hashlib.sha256(" ".join(_DEBIAN_PACKAGES).encode()).hexdigest()[:16]
    home = build.cache_root() / f"debian-{release[1]}-{recipe}"

    def make(folder: Path) -> None:
        install([] if shutil.which("debootstrap") else ["debootstrap"])
        options = ("--variant=minbase", f"--include={','.join(_DEBIAN_PACKAGES)}")
        run("debootstrap", *options, release[1], folder / "root", _mirror(), timeout_seconds=900)
        for unneeded in ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/cache/apt", "var/lib/apt/lists"):
            shutil.rmtree(folder / "root" / unneeded)

    if not home.exists():
        build.cached(home, make)
    return home / "root"


def _mirror() -> str:
    """The mirror that this machine's main archive comes from."""
    targets = run("apt-get", "indextargets", "--format", "$(REPO_URI) $(SUITE) $(COMPONENT)", "Created-By: Packages")
    for line in targets.splitlines():
        uri, suite, component = line.split()
        if component == "main" and "security" not in suite and not suite.endswith(("-updates", "-backports")):
            return uri
    raise ClusterError(
        expected="a source of Debian's main archive", found="none", remedy="add one to the machine's apt sources"
    )


def _furnish(root: Path, tools: Path, binaries: Path) -> None:
    files = _kind_module() / "images" / "base" / "files"
    _copy_open(files / "etc", root / "etc")
    _copy_open(files / "kind", root / "kind")
    programs = root / "usr/local/bin"
    shutil.copyfile(files / "usr/local/bin/entrypoint", programs / "entrypoint")
    for script in (programs / "entrypoint", *(root / "kind/bin").iterdir()):
        script.chmod(0o755)
    _arrange_units(root)
    for name in ("containerd", "ctr", "containerd-shim-runc-v2"):
        (programs / name).symlink_to(f"/usr/bin/{name}")
    shutil.copytree(root / "usr/lib/cni", root / "opt/cni/bin", dirs_exist_ok=True)
    (root / "etc/kubernetes/manifests").mkdir(parents=True)
    shutil.copy2(tools / "kubeadm", root / "usr/bin/kubeadm")
    shutil.copy2(binaries / "hyper", root / "usr/bin/hyper")
    for name in ("kubelet", "kubectl"):
        (root / "usr/bin" / name).symlink_to("hyper")
    (root / "kind/version").write_text(build.kubernetes_version((build.MODULE / "go.mod").read_text()))
    (root / "kind/manifests").mkdir(exist_ok=True)
    (root / "kind/manifests/default-storage.yaml").write_text(json.dumps(_STORAGE_CLASS))
    _write_shield(root)
    (root / "etc/containerd/cri-base.json").write_text(_base_runtime_spec(root))
    sandbox = re.search(r'sandbox_image = "([^"]+)"', (root / "etc/containerd/config.toml").read_text())
    if sandbox is None:
        raise ClusterError(
            expected="sandbox_image in kind's containerd configuration", found="none", remedy="adapt this file to kind"
        )
    write_archive(root / "kind/images.tar", *_images(root, tools, binaries, sandbox[1]))


def _arrange_units(root: Path) -> None:
    for pattern in _UNWANTED_UNITS:
        for unit in root.glob(pattern):
            unit.unlink()
    drop_in = root / "etc/systemd/system/containerd.service.d"
    drop_in.mkdir(parents=True)
    (drop_in / "import-images.conf").write_text(_IMPORT_IMAGES)
    with (root / "etc/systemd/journald.conf").open("a") as journald:
        journald.write("ReadKMsg=no\n")
    run("chroot", root, "systemctl", "enable", *_ENABLED_UNITS)
    run("chroot", root, "systemctl", "mask", *_MASKED_UNITS)


def _write_shield(root: Path) -> None:
    binds = []
    for sysctl, value in SHIELDED_SYSCTLS.items():
        fake = f"kind/sysctl/{sysctl}"
        (root / fake).parent.mkdir(parents=True, exist_ok=True)
        (root / fake).write_text(value + "\n")
        binds.append(f"mount --bind /{fake} /proc/sys/{sysctl}")
    shield = root / "usr/local/bin/shield"
    shield.write_text(_SHIELD.format(binds="\n".join(binds)))
    shield.chmod(0o755)


def _base_runtime_spec(root: Path) -> str:
    spec = json.loads(run("chroot", root, "ctr", "oci", "spec"))
    spec["process"].pop("rlimits", None)
    hooks = spec.setdefault("hooks", {}).setdefault("createContainer", [])
    hooks.append({"path": "/kind/bin/mount-product-files.sh"})
    return json.dumps(spec)


def _images(root: Path, tools: Path, binaries: Path, sandbox: str) -> list[Image]:
    """The images that kubeadm will ask for, under the names that it will use."""
    version = build.kubernetes_version((build.MODULE / "go.mod").read_text())
    names = run(tools / "kubeadm", "config", "images", "list", f"--kubernetes-version={version}").split()
    entries: dict[str, Entry] = {
        "tmp": Folder(mode=0o1777),
        "run": Folder(),
        "etc/passwd": File(b"root:x:0:0:root:/root:/bin/sh\n"),
        "usr/local/bin/hyper": File((binaries / "hyper").read_bytes(), mode=0o755),
        "usr/local/bin/etcd": File((binaries / "etcd").read_bytes(), mode=0o755),
        **{f"usr/local/bin/{name}": Link("hyper") for name in _CONTROL_PLANE if name != "etcd"},
        **{name: Link(f"usr/{name}") for name in ("lib", "lib64")},
        **_program_with_libraries(root, "/usr/sbin/nft"),
    }
    shared = with_parents(entries)
    config = {"Env": ["PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]}
    wanted = [name for name in names if name.rpartition("/")[2].partition(":")[0] in _CONTROL_PLANE]
    return [*(Image(name, shared, config) for name in wanted), pause_image(binaries / "pause", sandbox)]


def _program_with_libraries(root: Path, program: str) -> dict[str, Entry]:
    """kube-proxy runs this one, which unlike ours is not static."""
    listed = run("chroot", root, "ldd", program)
    paths = [program, *(word for line in listed.splitlines() for word in line.split() if word.startswith("/"))]
    found: dict[str, Entry] = {}
    for path in paths:
        real = run("chroot", root, "realpath", path).strip()
        inside = path if path.startswith("/usr/") else f"/usr{path}"
        found[inside.lstrip("/")] = File((root / real.lstrip("/")).read_bytes(), mode=0o755)
    return found


def _copy_open(source: Path, target: Path) -> None:
    """Copy files out of the Go module cache, where all are read-only."""
    for file in source.rglob("*"):
        place = target / file.relative_to(source)
        if file.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)


def _kind_module() -> Path:
    found = run(build.go_program(), "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/kind", cwd=build.MODULE).strip()
    if not found:
        run(build.go_program(), "mod", "download", "sigs.k8s.io/kind", cwd=build.MODULE, timeout_seconds=300)
        return _kind_module()
    return Path(found)
