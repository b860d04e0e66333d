"""How `resilientllm` ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from resilientllm_cli import tiny_model
from resilientllm_cli.main import INTERRUPTED, run


def test_an_interrupted_command_says_so_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_model, "write_tiny_model", interrupted)

    assert run(["make-tiny-model", str(tmp_path / "model")]) == INTERRUPTED
    assert capsys.readouterr().err == "resilientllm: interrupted\n"
