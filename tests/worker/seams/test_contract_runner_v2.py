"""V2's runner finds in `TokensFromScheduler` all that it calls on its own handler. Read from source: no Triton here."""

from __future__ import annotations

import ast
import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.worker.seams.vllm_source import (
    attributes_of,
    class_of,
    files_under,
    methods,
    names_imported_by,
    parameters,
    source_of,
    tree,
)

RUNNER, HANDLER = "v1/worker/gpu/model_runner.py", "v1/worker/gpu/pp_utils.py"


@pytest.fixture
def ours() -> type:
    from resilientllm_worker.seams.runner_v2 import TokensFromScheduler

    return TokensFromScheduler


def test_the_names_that_are_replaced_are_those_that_the_runner_uses() -> None:
    assert {"PPHandler", "set_default_max_concurrency"} <= names_imported_by(RUNNER), (
        "V2's runner imports PPHandler or set_default_max_concurrency in another way: "
        "RunnerV2.before_construction replaces nothing"
    )
    constructor = source_of(RUNNER, "GPUModelRunner", "__init__")
    assert "PPHandler(" in constructor and "set_default_max_concurrency(" in constructor


def test_it_is_constructed_as_the_stock_handler(ours: type) -> None:
    stock = parameters(methods(class_of(HANDLER, "PPHandler"))["__init__"])
    assert stock == list(inspect.signature(ours).parameters)


def test_it_has_every_public_method_of_the_stock_handler_with_its_parameters(ours: type) -> None:
    for name, stock in methods(class_of(HANDLER, "PPHandler")).items():
        if name.startswith("_"):
            continue
        method = getattr(ours, name, None)
        assert method is not None, f"PPHandler.{name} is new: look at seams/runner_v2.py"
        found = [each for each in inspect.signature(method).parameters if each != "self"]
        assert len(found) == len(parameters(stock)), f"PPHandler.{name} takes {parameters(stock)}, ours {found}"


def test_the_runner_calls_nothing_else_on_it(ours: type) -> None:
    called = {
        name for path in files_under("v1/worker/gpu") for name in attributes_of(path, "self.pp_handler", "pp_handler")
    }
    assert called
    assert {name for name in called if not hasattr(ours, name)} == set()


def test_the_runner_has_the_state_that_is_read(ours: type) -> None:
    request_state = source_of("v1/worker/gpu/states.py", "RequestState", "__init__")
    assert "self.req_id_to_index" in request_state and "self.prefill_len" in request_state
    (helper,) = [node for node in tree(HANDLER).body if getattr(node, "name", "") == "compute_need_sampled_mask"]
    assert parameters(helper) == ["input_batch"]  # type: ignore[arg-type]


def test_the_runner_takes_tokens_as_they_are_offered() -> None:
    consumer = "".join(
        source_of(RUNNER, "GPUModelRunner", name)
        for name in methods(class_of(RUNNER, "GPUModelRunner"))
        if "get_prev_sampled_outputs" in source_of(RUNNER, "GPUModelRunner", name)
    )
    assert "**" in consumer or all(name in consumer for name in ("idx_mapping", "sampled_tokens")), consumer
    stock = source_of(HANDLER, "PPHandler", "get_prev_sampled_outputs")
    for name in ("idx_mapping", "sampled_tokens", "num_sampled", "num_rejected"):
        assert name in stock, f"PPHandler.get_prev_sampled_outputs does not give {name} any more"


class TestRows:
    """Hidden states of two tenants' steps are merged by foretelling where the runner puts each request."""

    def test_are_in_the_order_of_the_function_that_is_asked(self) -> None:
        gather = source_of(RUNNER, "GPUModelRunner", "gather_batch_req_state")
        assert "sort_batch_req_ids(num_tokens_per_req, draft_tokens, self.decode_query_len)" in gather
        assert "num_tokens_per_req = scheduler_output.num_scheduled_tokens" in gather
        prepare = source_of(RUNNER, "GPUModelRunner", "prepare_inputs")
        assert "req_ids = batch_req_state.req_ids" in prepare
        assert prepare.count("req_ids=req_ids") == 1, "prepare_inputs makes its batch in another order"

    @given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.lists(st.integers(1, 9), min_size=1, max_size=12))
    def test_of_a_tenant_keep_their_order_beside_another_tenants(self, mine: list[int], theirs: list[int]) -> None:
        """Nothing relies on it, but spans are few because of it, and those of decoding requests are never copied."""
        tokens = {f"0/{place}": count for place, count in enumerate(mine)}
        both = tokens | {f"1/{place}": count for place, count in enumerate(theirs)}
        order = [request for request in stock_order()(both, {}, 1) if request in tokens]
        assert order == stock_order()(tokens, {}, 1)


def stock_order() -> Any:
    """vLLM's own function, without what its module imports."""
    (function,) = [node for node in tree(RUNNER).body if getattr(node, "name", "") == "sort_batch_req_ids"]
    names: dict[str, Any] = {}
    exec(compile(ast.Module([function], []), RUNNER, "exec"), names)
    return names["sort_batch_req_ids"]


class TestOffers:
    """Tokens of decoding requests, for stages that did not sample them."""

    def handler(self, ours: type, is_last: bool = False) -> Any:
        handler: Any = object.__new__(ours)
        handler.is_last_rank, handler.device, handler._offered = is_last, torch.device("cpu"), None
        return handler

    def states(self) -> Any:
        """Requests "p" in slot 2 with a prompt of 8, and "d" in slot 5 with one of 4."""
        lengths = np.zeros(8, dtype=np.int32)
        lengths[[2, 5]] = 8, 4
        return SimpleNamespace(req_id_to_index={"p": 2, "d": 5}, prefill_len=SimpleNamespace(np=lengths))

    def cached(self) -> Any:
        return SimpleNamespace(req_ids=["p", "d"], num_computed_tokens=[4, 6], new_token_ids=[[], [99]])

    def test_only_requests_past_their_prompt_have_one(self, ours: type) -> None:
        handler = self.handler(ours)
        handler.offer(self.cached(), self.states())
        offered = handler.get_prev_sampled_outputs()
        assert offered["idx_mapping"].tolist() == [5]
        assert offered["sampled_tokens"].tolist() == [[99]]
        assert offered["num_sampled"].tolist() == [1] and offered["num_rejected"].tolist() == [0]

    def test_they_are_taken_once(self, ours: type) -> None:
        handler = self.handler(ours)
        handler.offer(self.cached(), self.states())
        handler.get_prev_sampled_outputs()
        assert handler.get_prev_sampled_outputs() is None

    def test_those_of_the_step_before_are_never_left_over(self, ours: type) -> None:
        handler = self.handler(ours)
        handler.offer(self.cached(), self.states())
        handler.offer(SimpleNamespace(req_ids=[], num_computed_tokens=[], new_token_ids=[]), self.states())
        assert handler.get_prev_sampled_outputs() is None

    def test_the_last_stage_has_them_already(self, ours: type) -> None:
        handler = self.handler(ours, is_last=True)
        handler.offer(self.cached(), self.states())
        assert handler.get_prev_sampled_outputs() is None
