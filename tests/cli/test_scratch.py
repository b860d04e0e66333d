"""Temporary folders: short enough for the sockets of those who get them, wherever the user's own is."""

from __future__ import annotations

import shutil
import socket
import tempfile
import uuid
from pathlib import Path

import pytest
from resilientllm_cli.local.layout import engine_name
from resilientllm_cli.supervise import scratch


@pytest.mark.parametrize("depth_bytes", [0, 33, 34, 35, 200])
def test_a_socket_can_be_bound_in_it_however_deep_the_usual_place_is(
    depth_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as base:
        usual = Path(base)
        while (missing := depth_bytes - len(str(usual)) - 1) > 0:
            usual /= "d" * min(missing, 100)
        usual.mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(tempfile, "tempdir", str(usual))
        folder = scratch.make()
        try:
            assert folder.stat().st_mode & 0o777 == 0o700
            assert folder.parent == (usual if scratch.has_room(usual) else Path("/tmp"))
            of_engine = folder / engine_name(100_000)
            of_engine.mkdir()
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(str(of_engine / str(uuid.uuid4())))
        finally:
            shutil.rmtree(folder)


def test_the_usual_place_is_used_where_it_can_be() -> None:
    assert scratch.has_room(Path("/tmp"))
    assert scratch.has_room(Path("/" + "d" * 33))
    assert not scratch.has_room(Path("/" + "d" * 34))
