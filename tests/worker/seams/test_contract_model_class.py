"""vLLM still looks at a model's class through the function that we replace, and that works without another process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from resilientllm_worker.seams.model_class import look_at_models_here
from vllm.model_executor.models import registry

from tests.worker.seams.vllm_source import source_of

MODULE, CLASS = "vllm.model_executor.models.llama", "LlamaForCausalLM"


@pytest.fixture
def replaced() -> Iterator[None]:
    stock = registry._run_in_subprocess
    look_at_models_here()
    yield
    registry._run_in_subprocess = stock


def test_what_is_replaced_is_what_looks() -> None:
    source = source_of("model_executor/models/registry.py", "_LazyRegisteredModel", "inspect_model_cls")
    assert source.count("_run_in_subprocess(") == 1
    assert callable(registry._run_in_subprocess)


@pytest.mark.usefixtures("replaced")
def test_a_class_is_looked_at_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.envs.VLLM_CACHE_ROOT", str(tmp_path))  # where a new pod finds nothing
    monkeypatch.setattr(registry, "_SUBPROCESS_COMMAND", ["false"])
    seen = registry._LazyRegisteredModel(module_name=MODULE, class_name=CLASS).inspect_model_cls()
    assert seen.supports_pp and seen.is_text_generation_model
