"""Where vLLM's executor and scheduler of one engine meet.

EngineCore makes both from one config and introduces them to nobody. The executor is made first
(vllm/v1/engine/core.py), so it leaves its pipeline here for the scheduler of the same process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resilientllm_worker.engine.pipeline import Pipeline

_pipelines: dict[str, Pipeline] = {}


def introduce(instance_id: str, pipeline: Pipeline) -> None:
    """``instance_id`` is vLLM's own name for the config."""
    _pipelines[instance_id] = pipeline


def pipeline_of(instance_id: str) -> Pipeline:
    pipeline = _pipelines.get(instance_id)
    if pipeline is None:
        raise RuntimeError("the scheduler found no pipeline: it works only together with ResilientExecutor")
    return pipeline


def leave(instance_id: str) -> None:
    _pipelines.pop(instance_id, None)
