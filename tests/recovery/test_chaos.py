"""A short run of the whole harness: its world comes up, two faults land, every stream is compared, nothing leaks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.chaos.enclosed import possible

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(420),
    pytest.mark.skipif(not possible(), reason="namespaces of its own are not allowed here"),
]

KINDS = {"kill-last", "engine-stage-cut"}
SECONDS = 400.0


def test_two_faults_land_and_cost_no_token(tmp_path: Path) -> None:
    output = tmp_path / "chaos.jsonl"
    words = [
        *("--faults", ",".join(sorted(KINDS)), "--runs", "1", "--shapes", "2x2"),
        *("--output", str(output), "--directory", str(tmp_path / "chaos")),
    ]
    done = subprocess.run(
        [str(Path(sys.executable).with_name("resilientllm")), "chaos", *words],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert output.exists(), done.stdout + done.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert {line["fault"]: line["problems"] for line in lines} == {kind: [] for kind in KINDS}, done.stdout
    assert all(line["landed"] and line["streams_met"] for line in lines)
    assert done.returncode == 0
