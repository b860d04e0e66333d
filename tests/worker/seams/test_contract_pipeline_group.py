"""What vLLM asks its pipeline group, `VirtualPipeline` answers."""

from __future__ import annotations

import ast
import contextlib
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from resilientllm_worker.seams.pipeline_group import Binding, VirtualPipeline

from tests.worker.seams.vllm_source import attributes_of, class_of, files_under, mentions, methods, parameters, tree

USERS = [
    "v1/worker/cpu_model_runner.py",
    "v1/worker/cpu_worker.py",
    "v1/worker/gpu_model_runner.py",
    "v1/worker/gpu_worker.py",
    "v1/worker/utils.py",
    "v1/worker/worker_base.py",
    *(path for path in files_under("v1/worker/gpu") if "/spec_decode/" not in path),
    *files_under("model_executor/models"),
]
"""The worker, both runners and the models. Speculative decoding is refused at start-up."""

NEVER_REACHED = {
    # gpu_model_runner.py: only with vLLM's external launcher (broadcast_pp_output)
    "send_tensor_dict": "v1/worker/gpu_model_runner.py",
    "broadcast_tensor_dict": "v1/worker/gpu_model_runner.py",
    # gpu_model_runner.py: only with asynchronous scheduling, which is refused at start-up
    "broadcast": "v1/worker/gpu_model_runner.py",
}


def a_pipeline(stage: int = 1, stages: int = 3) -> VirtualPipeline:
    world = SimpleNamespace(local_rank=0, device=torch.device("cpu"), device_group=object(), cpu_group=object())
    return VirtualPipeline(stage, stages, world)


@functools.cache
def uses() -> dict[str, set[str]]:
    """Every attribute of the pipeline group that is used, and where."""
    found: dict[str, set[str]] = {}
    for path in USERS:
        if not mentions(path, "get_pp_group()"):
            continue
        owners = {"get_pp_group()"}
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Assign) and ast.unparse(node.value) == "get_pp_group()":
                owners |= {ast.unparse(target) for target in node.targets}
        for name in attributes_of(path, *owners):
            found.setdefault(name, set()).add(path)
    return found


def test_it_has_every_attribute_that_worker_runners_and_models_use() -> None:
    missing = {
        name: sorted(where)
        for name, where in uses().items()
        if not hasattr(a_pipeline(), name) and not (name in NEVER_REACHED and where == {NEVER_REACHED[name]})
    }
    assert not missing, (
        f"vLLM uses attributes of its pipeline group that VirtualPipeline lacks: {missing}. "
        "Look at worker/src/resilientllm_worker/seams/pipeline_group.py"
    )


def test_the_search_for_uses_finds_some() -> None:
    assert {"is_first_rank", "is_last_rank", "irecv_tensor_dict", "isend_tensor_dict", "rank_in_group"} <= uses().keys()


def test_graph_capture_enters_it_as_it_enters_the_stock_group() -> None:
    stock = methods(class_of("distributed/parallel_state.py", "GroupCoordinator"))["graph_capture"]
    assert len(parameters(stock)) == 1
    with a_pipeline().graph_capture("context") as given:
        assert given == "context"


@pytest.mark.parametrize("stage", range(3))
def test_places_are_those_of_the_stage(stage: int) -> None:
    group = a_pipeline(stage)
    assert (group.rank_in_group, group.world_size, group.ranks) == (stage, 3, [0, 1, 2])
    assert (group.is_first_rank, group.is_last_rank) == (stage == 0, stage == 2)
    assert (group.next_rank, group.prev_rank) == ((stage + 1) % 3, (stage - 1) % 3)


def test_a_step_moves_its_tensors_over_the_links_that_it_was_bound_to() -> None:
    group, sent, waited = a_pipeline(), [], []

    def send(tensors: dict[str, torch.Tensor]) -> Any:
        sent.append(tensors)
        return SimpleNamespace(wait=lambda: waited.append(True))

    inbound, outbound = {"hidden": torch.ones(1)}, {"hidden": torch.zeros(1)}
    with group.bound(Binding(inbound, send)):
        received, handles, postprocess = group.irecv_tensor_dict(all_gather_group=None, all_gather_tensors={})
        remaining = group.isend_tensor_dict(outbound, all_gather_group=None, all_gather_tensors={})[1:]
    assert received is inbound and not handles and not postprocess
    assert sent == [outbound]
    for handle in remaining:  # as gpu_worker.py does at the next step
        handle.wait()
    assert waited


def test_a_step_that_was_bound_to_nothing_moves_nothing() -> None:
    group = a_pipeline()
    for move in (group.irecv_tensor_dict, lambda: group.isend_tensor_dict({})):
        with pytest.raises(RuntimeError, match="bound without"):
            move()


def test_a_binding_ends_with_its_step_even_if_that_fails() -> None:
    group = a_pipeline()
    with contextlib.suppress(KeyError), group.bound(Binding({}, None)):
        raise KeyError
    with pytest.raises(RuntimeError, match="bound without"):
        group.irecv_tensor_dict()


def test_the_worker_drops_the_first_handle_of_a_send() -> None:
    """Ours are twice the same because of this."""
    source = ast.unparse(tree("v1/worker/gpu_worker.py"))
    assert "handles[1:]" in source, "look at VirtualPipeline.isend_tensor_dict"
