"""Image archives: what containerd and Docker read in them, without either being there."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster.image import NONROOT_ID, File, Folder, Image, thin_root, write_archive, write_thin_image

REF = "resilientllm/worker:dev"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder and a file of this machine, to be seen in containers."""
    (tmp_path / "checkout").mkdir()
    (tmp_path / "ld.so.cache").write_text("cache")
    return tmp_path


def read(archive: Path) -> tuple[dict[str, Any], dict[str, Any], tarfile.TarFile, bytes]:
    """Manifest, config and layer of an archive, found as an importer finds them."""
    with tarfile.open(archive) as outer:

        def content(name: str) -> bytes:
            member = outer.extractfile(name)
            assert member is not None
            return member.read()

        (manifest,) = json.loads(content("manifest.json"))
        layer = content(manifest["Layers"][0])
        config = json.loads(content(manifest["Config"]))
    return manifest, config, tarfile.open(fileobj=io.BytesIO(layer)), layer


def test_archive_names_the_image_as_pod_specs_do(tmp_path: Path) -> None:
    write_thin_image(tmp_path / "image.tar", REF, entrypoint=["/bin/true"])

    manifest, _, _, _ = read(tmp_path / "image.tar")

    assert manifest["RepoTags"] == [REF]


def test_layer_has_the_digest_that_the_config_promises(tmp_path: Path) -> None:
    write_thin_image(tmp_path / "image.tar", REF, entrypoint=["/bin/true"])

    _, config, _, layer = read(tmp_path / "image.tar")

    assert config["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(layer).hexdigest()}"]


def test_image_runs_as_a_numeric_user_without_rights(tmp_path: Path) -> None:
    """The kubelet can prove `runAsNonRoot` for a number only."""
    write_thin_image(tmp_path / "image.tar", REF, entrypoint=["/venv/bin/python", "-m", "x"], env={"A": "b"})

    _, config, _, _ = read(tmp_path / "image.tar")

    assert config["config"]["User"] == f"{NONROOT_ID}:{NONROOT_ID}"
    assert config["config"]["Entrypoint"] == ["/venv/bin/python", "-m", "x"]
    assert "A=b" in config["config"]["Env"]


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first.tar", "second.tar"):
        write_thin_image(tmp_path / name, REF, entrypoint=["/bin/true"], env={"A": "b"})

    assert (tmp_path / "first.tar").read_bytes() == (tmp_path / "second.tar").read_bytes()


def test_every_mount_has_its_place_and_open_parents(tmp_path: Path, machine: Path) -> None:
    mounts = [machine / "checkout", machine / "ld.so.cache"]
    write_thin_image(tmp_path / "image.tar", REF, entrypoint=["/bin/true"], mounts=mounts)

    _, _, layer, _ = read(tmp_path / "image.tar")

    assert layer.getmember(str(mounts[0]).lstrip("/")).isdir()
    assert layer.getmember(str(mounts[1]).lstrip("/")).isreg()
    for parent in mounts[0].parents[:-1]:
        member = layer.getmember(str(parent).lstrip("/"))
        assert member.isdir()
        assert member.mode & 0o005 == 0o005, f"{parent} must be open to a user without rights"


def test_roots_home_is_open_in_the_image() -> None:
    """On the machine it is private, and an interpreter may lie below it."""
    assert thin_root([])["root"] == Folder(mode=0o755)


def test_temporary_folder_is_everyones() -> None:
    assert thin_root([])["tmp"] == Folder(mode=0o1777)


def test_parents_come_before_their_children_in_a_layer(tmp_path: Path, machine: Path) -> None:
    write_archive(tmp_path / "image.tar", Image(REF, thin_root([machine / "checkout"]), {}))

    _, _, layer, _ = read(tmp_path / "image.tar")

    names = layer.getnames()
    for position, name in enumerate(names):
        parent = str(Path(name).parent)
        assert parent == "." or parent in names[:position]


def test_images_with_the_same_root_share_its_layer(tmp_path: Path) -> None:
    root = {"program": File(b"x" * 100_000)}
    images = [Image(f"resilientllm/{name}:dev", root, {"Entrypoint": [name]}) for name in ("one", "two", "three")]

    write_archive(tmp_path / "image.tar", *images)

    with tarfile.open(tmp_path / "image.tar") as archive:
        layers = [name for name in archive.getnames() if name.endswith("layer.tar")]
        manifest = archive.extractfile("manifest.json")
        assert manifest is not None
        described = json.loads(manifest.read())
    assert len(layers) == 1
    assert [entry["RepoTags"] for entry in described] == [[image.ref] for image in images]
    assert len({entry["Config"] for entry in described}) == 3
