"""A tiny model, and programs that stand in for stages and engines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from resilientllm_cli.tiny_model import TinyModel, write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_model(directory, TinyModel())
    return directory


@pytest.fixture
def fake_executables(tmp_path: Path) -> dict[str, str]:
    """See ``fake_worker.py``."""
    script = tmp_path / "fake-worker"
    script.write_text(f"#!{sys.executable}\n" + Path(__file__).with_name("fake_worker.py").read_text())
    script.chmod(0o755)
    return {"resilientllm-stage": str(script), "resilientllm-engine": str(script)}
