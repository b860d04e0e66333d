"""Real stages and engines as processes of this machine. They start once for a module, since imports take long."""

from __future__ import annotations

from pathlib import Path

import pytest
from resilientllm_cli.tiny_model import TinyModel, write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_model(directory, TinyModel())
    return directory
