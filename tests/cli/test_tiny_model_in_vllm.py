"""What the test model is for: its greedy output goes on without loops, and depends on every block of its KV cache."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def outputs(tiny_model: Path) -> Any:
    script = Path(__file__).with_name("kv_sensitivity.py")
    done = subprocess.run([sys.executable, str(script), str(tiny_model)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_long_greedy_outputs_do_not_loop(outputs: Any) -> None:
    for tokens in outputs["long"]:
        triples = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
        assert len(set(triples)) > 0.9 * len(triples)
        assert sum(a == b for a, b in pairwise(tokens)) < 0.1 * len(tokens)


def test_different_prompts_have_different_outputs(outputs: Any) -> None:
    assert len({tuple(tokens[:20]) for tokens in outputs["long"]}) == len(outputs["long"])


def test_no_output_ends_by_itself(outputs: Any) -> None:
    assert all(token < 256 for tokens in outputs["long"] for token in tokens)


def test_any_spoiled_block_changes_the_output_that_follows(outputs: Any) -> None:
    unnoticed = [spoil for spoil, tokens in outputs["spoiled"].items() if tokens == outputs["undisturbed"]]
    assert len(outputs["spoiled"]) == 36
    assert unnoticed == []
