"""Where programs keep temporary files, so that none of them stays: neither vLLM nor torch removes its own when killed.

One folder for a supervisor, one in it for each program, which is its TMPDIR.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

PREFIX = "resilientllm-"
SHORT_PARENT = Path("/tmp")
SUN_PATH_BYTES = 107
"""How long the path of a Unix socket may be (unix(7)): a longer one cannot be bound."""
SOCKET_BYTES = 37
"""A slash and a UUID: how vLLM names the sockets of its processes in TMPDIR (``get_open_zmq_ipc_path``)."""
FOLDER_BYTES = len(f"/{PREFIX}12345678/engine-100000")


def has_room(parent: Path) -> bool:
    """Whether a program's sockets can be bound below ``parent``."""
    return len(os.fsencode(parent)) + FOLDER_BYTES + SOCKET_BYTES <= SUN_PATH_BYTES


def make() -> Path:
    """A new folder that only this user can open: in the usual place, unless that is so deep that sockets fail there.

    Not beside the logs: a checkout may be deep as well.
    """
    usual = Path(tempfile.gettempdir())
    return Path(tempfile.mkdtemp(prefix=PREFIX, dir=usual if has_room(usual) else SHORT_PARENT))
