"""``build/e2e.jsonl``: a line for every scenario that ran, with what was done, proven and measured."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from e2e.cluster.launch import REPOSITORY

FILE = REPOSITORY / "build" / "e2e.jsonl"

_RUN = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}/{os.getpid()}"
"""Names this run, so that lines of several can be told apart."""


def write(line: Mapping[str, Any], file: Path = FILE) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as ledger:
        ledger.write(json.dumps({"run": _RUN, **line}, default=str) + "\n")
