"""Image archives written with the standard library, since there is neither a registry nor a Docker.

The format is that of ``docker save``: the importers of containerd, Docker and kind all take it and
complete a short name such as ``resilientllm/worker:dev`` in the way in which a pod spec's is
completed, which they do not for an OCI layout.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .errors import ClusterError

PAUSE_REF = "resilientllm/pause:dev"
OPERATOR_REF = "resilientllm/operator:dev"
WORKER_REF = "resilientllm/worker:dev"

NONROOT_ID = 65532
"""User and group of our images, as pods of the ``restricted`` Pod Security level must have one."""

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

_PASSWD = f"""\
root:x:0:0:root:/root:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
nonroot:x:{NONROOT_ID}:{NONROOT_ID}:nonroot:/home/nonroot:/bin/sh
"""
_GROUP = f"root:x:0:\nnogroup:x:65534:\nnonroot:x:{NONROOT_ID}:\n"


@dataclass(frozen=True)
class Folder:
    mode: int = 0o755
    owner: int = 0


@dataclass(frozen=True)
class Link:
    target: str


@dataclass(frozen=True)
class File:
    content: bytes
    mode: int = 0o644


Entry = Folder | Link | File


def thin_root(mounts: Sequence[Path]) -> dict[str, Entry]:
    """A root file system that has only the places where a node mounts the machine's own files.

    It is kilobytes where a real image with torch in it would be gigabytes, on each of the nodes.
    """
    entries: dict[str, Entry] = {
        "tmp": Folder(mode=0o1777),
        "home/nonroot": Folder(mode=0o700, owner=NONROOT_ID),
        "etc/passwd": File(_PASSWD.encode()),
        "etc/group": File(_GROUP.encode()),
        "etc/nsswitch.conf": File(b"hosts: files dns\n"),
    }
    for name in ("dev", "etc", "home", "proc", "root", "run", "sys", "usr", "var"):
        entries[name] = Folder()
    for name in ("bin", "sbin", "lib", "lib64"):
        entries[name] = Link(f"usr/{name}")
    for mount in mounts:
        place = str(PurePosixPath(mount)).lstrip("/")
        entries[place] = Folder() if mount.is_dir() else File(b"")
    return with_parents(entries)


def write_thin_image(
    archive: Path,
    ref: str,
    *,
    entrypoint: Sequence[str],
    env: Mapping[str, str] | None = None,
    mounts: Sequence[Path] = (),
    working_dir: str = "/",
) -> None:
    """Write an image that runs the machine's own files as a user without rights.

    ``mounts`` must be those that the cluster was brought up with. A path that lies below a folder
    over which a pod mounts a volume, such as /tmp, is hidden by it.
    """
    variables = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/home/nonroot", "LANG": "C.UTF-8", **(env or {})}
    config = {
        "User": f"{NONROOT_ID}:{NONROOT_ID}",
        "Env": [f"{name}={value}" for name, value in variables.items()],
        "Entrypoint": list(entrypoint),
        "WorkingDir": working_dir,
    }
    write_archive(archive, Image(ref, thin_root(mounts), config))


def pause_image(pause: Path, ref: str = PAUSE_REF) -> Image:
    """The image of the process that holds a pod's namespaces."""
    root = {"pause": File(pause.read_bytes(), mode=0o755)}
    return Image(ref, root, {"Entrypoint": ["/pause"], "User": "65535:65535"})


@dataclass(frozen=True)
class Image:
    """One image of an archive: a single layer, and how its container starts."""

    ref: str
    root: Mapping[str, Entry]
    config: Mapping[str, object]


def write_archive(archive: Path, *images: Image) -> None:
    """Write images into one archive, equal layers once. The same input gives the same bytes."""
    manifest = []
    parts: dict[str, Entry] = {}
    layers = {id(image.root): layer_tar(image.root) for image in images}
    for image in images:
        layer = layers[id(image.root)]
        digest = hashlib.sha256(layer).hexdigest()
        content = json.dumps(
            {
                "architecture": architecture(),
                "os": "linux",
                "created": "1970-01-01T00:00:00Z",
                "config": dict(image.config),
                "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
            },
            sort_keys=True,
        ).encode()
        config_name = f"{hashlib.sha256(content).hexdigest()}.json"
        layer_name = f"{digest}/layer.tar"
        manifest.append({"Config": config_name, "RepoTags": [image.ref], "Layers": [layer_name]})
        parts |= {config_name: File(content), layer_name: File(layer)}
    parts["manifest.json"] = File(json.dumps(manifest).encode())
    archive.write_bytes(layer_tar(parts))


def layer_tar(entries: Mapping[str, Entry]) -> bytes:
    """A tar of the entries, parents before children, without anything that differs between runs."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in sorted(entries):
            _add(tar, name, entries[name])
    return buffer.getvalue()


def architecture() -> str:
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise ClusterError(
            expected="a machine of type " + " or ".join(_ARCHITECTURES), found=machine, remedy="use such a machine"
        )
    return _ARCHITECTURES[machine]


def _add(tar: tarfile.TarFile, name: str, entry: Entry) -> None:
    info = tarfile.TarInfo(name)
    match entry:
        case Folder(mode, owner):
            info.type, info.mode, info.uid, info.gid = tarfile.DIRTYPE, mode, owner, owner
            tar.addfile(info)
        case Link(target):
            info.type, info.mode, info.linkname = tarfile.SYMTYPE, 0o777, target
            tar.addfile(info)
        case File(content, mode):
            info.mode, info.size = mode, len(content)
            tar.addfile(info, io.BytesIO(content))


def with_parents(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries with the folders above them, open to all."""
    # An explicit parent matters: /root must be open to all in the image, as it is not on the machine.
    complete = dict(entries)
    for name in entries:
        for parent in PurePosixPath(name).parents:
            if str(parent) != ".":
                complete.setdefault(str(parent), Folder())
    return complete
