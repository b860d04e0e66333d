"""Two tenants' steps as one: what may be merged, where each row is, and whose each outcome is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from resilientllm_worker.protocol.messages import CachedRequests, Grammar, Logprobs, NewRequest, Stamp, Step, StepResult
from resilientllm_worker.seams.arrays import decode_array, encode_array
from resilientllm_worker.seams.scheduler_output import decode_step
from resilientllm_worker.stage.merge import Room, Span, gather, merged, scatter, share, spans, why_apart
from vllm import SamplingParams

ROOM = Room(tokens=64, requests=8)
PARAMS = msgspec.msgpack.encode(SamplingParams())


def new(request: str, block: int = 1) -> NewRequest:
    return NewRequest(request, [1, 2, 3], None, PARAMS, ([block],), 0)


def step(prefix: str, *, fresh: int = 0, running: int = 0, number: int = 0, **changes: Any) -> Step:
    """``fresh`` requests of three tokens each, and ``running`` ones of one token."""
    news = [f"{prefix}n{place}" for place in range(fresh)]
    known = [f"{prefix}c{place}" for place in range(running)]
    settings: dict[str, Any] = {
        "stamp": Stamp(1, 1),
        "step": number,
        "new": [new(request) for request in news],
        "cached": CachedRequests(
            known, [[5]] * running, [None] * running, [9 + place for place in range(running)], [4] * running
        ),
        "num_scheduled_tokens": [*((request, 1) for request in known), *((request, 3) for request in news)],
        "finished": [],
        "preempted": [],
        "zero_block_ids": [],
        "block_copies": [],
        "grammar": None,
    }
    return Step(**settings | changes)


def grammar(*requests: str, fill: bytes = b"\1", columns: int = 2) -> Grammar:
    return Grammar(list(requests), fill * 4 * columns * len(requests), columns)


class TestWhatIsApart:
    def test_is_nothing_without_a_reason(self) -> None:
        assert why_apart([step("0/", fresh=1, running=2), step("1/", running=3)], ROOM) is None

    def test_a_step_may_fill_the_room_to_the_last_token_and_request(self) -> None:
        steps = [step("0/", fresh=1), step("1/", running=2)]
        assert why_apart(steps, Room(tokens=5, requests=3)) is None
        assert "5 tokens" in str(why_apart(steps, Room(tokens=4, requests=3)))
        assert "3 requests" in str(why_apart(steps, Room(tokens=5, requests=2)))

    def test_a_step_without_tokens_has_no_hidden_states(self) -> None:
        assert "nothing to compute" in str(why_apart([step("0/", running=1), step("1/", finished=["1/x"])], ROOM))

    def test_a_grammar_of_another_vocabulary(self) -> None:
        mine = step("0/", running=1, grammar=grammar("0/c0", columns=2))
        theirs = step("1/", running=1, grammar=grammar("1/c0", columns=3))
        assert "grammars" in str(why_apart([mine, theirs], ROOM))
        assert why_apart([mine, step("1/", running=1)], ROOM) is None

    def test_a_step_with_sampled_tokens_and_one_without(self) -> None:
        without = step("1/", running=1, cached=CachedRequests(["1/c0"], [], [None], [9], [4]))
        assert "sampled tokens" in str(why_apart([step("0/", running=1), without], ROOM))
        assert why_apart([without, without], ROOM) is None
        assert why_apart([step("0/", fresh=1), without], ROOM) is None, "fresh requests have none anyway"

    def test_lists_that_would_be_right_only_together(self) -> None:
        """One has a figure too many, the other one too few: merged, the one's would be read as the other's."""
        mine = step("0/", running=1, cached=CachedRequests(["0/c0"], [[5]], [None], [9, 9], [4]))
        theirs = step("1/", running=1, cached=CachedRequests(["1/c0"], [[5]], [None], [], [4]))
        assert "refused alone" in str(why_apart([mine, theirs], ROOM))

    def test_bitmasks_that_would_be_right_only_together(self) -> None:
        short = msgspec.structs.replace(grammar("0/c0"), bitmask=b"\1" * 4)
        long = msgspec.structs.replace(grammar("1/c0"), bitmask=b"\1" * 12)
        steps = [step("0/", running=1, grammar=short), step("1/", running=1, grammar=long)]
        assert "refused alone" in str(why_apart(steps, ROOM))


class TestTheMergedStep:
    def test_is_one_that_the_runner_can_take_and_has_all_of_both(self) -> None:
        mine = step("0/", fresh=1, running=2, number=4, finished=["0/f"], zero_block_ids=[3], block_copies=[(1, 2)])
        theirs = step(
            "1/", fresh=2, running=1, number=9, preempted=["1/p"], zero_block_ids=[17], block_copies=[(18, 19)]
        )
        output, _ = decode_step(merged([mine, theirs]))
        assert [request.req_id for request in output.scheduled_new_reqs] == ["0/n0", "1/n0", "1/n1"]
        cached = output.scheduled_cached_reqs
        assert list(zip(cached.req_ids, cached.num_computed_tokens, strict=True)) == [
            ("0/c0", 9),
            ("0/c1", 10),
            ("1/c0", 9),
        ]
        assert list(output.num_scheduled_tokens) == ["0/c0", "0/c1", "0/n0", "1/c0", "1/n0", "1/n1"]
        assert output.total_num_scheduled_tokens == 5 + 7
        assert (output.finished_req_ids, output.preempted_req_ids) == ({"0/f"}, {"1/p"})
        assert output.new_block_ids_to_zero == [3, 17]
        assert [tuple(copy) for copy in output.kv_cache_block_copies or ()] == [(1, 2), (18, 19)]

    def test_leaves_those_of_the_tenants_alone(self) -> None:
        mine, theirs = step("0/", fresh=1, running=1), step("1/", running=2)
        before = msgspec.msgpack.encode([mine, theirs])
        merged([mine, theirs])
        assert msgspec.msgpack.encode([mine, theirs]) == before

    def test_has_each_request_next_to_its_own_row_of_the_bitmask(self) -> None:
        mine = step("0/", running=2, grammar=grammar("0/c1", fill=b"\1"))
        theirs = step("1/", running=1, grammar=grammar("1/c0", fill=b"\2"))
        _, rules = decode_step(merged([mine, theirs]))
        assert rules is not None
        assert rules.structured_output_request_ids == ["0/c1", "1/c0"]
        assert rules.grammar_bitmask.tolist() == [[0x01010101] * 2, [0x02020202] * 2]

    def test_has_the_grammar_of_the_only_one_that_has_any(self) -> None:
        theirs = step("1/", running=1, grammar=grammar("1/c0"))
        assert merged([step("0/", running=1), theirs]).grammar == theirs.grammar


Order = Callable[[Sequence[tuple[str, int]]], list[str]]


def as_scheduled(tokens: Sequence[tuple[str, int]]) -> list[str]:
    return [request for request, _ in tokens]


def shortest_first(tokens: Sequence[tuple[str, int]]) -> list[str]:
    return as_scheduled(sorted(tokens, key=lambda each: (each[1] != 1, each[1])))


def backwards(tokens: Sequence[tuple[str, int]]) -> list[str]:
    """No runner has it. It shows that nothing relies on a tenant's order being the same within the merged one."""
    return as_scheduled(tokens)[::-1] if len(tokens) % 2 else as_scheduled(tokens)


batches = st.lists(st.integers(1, 5), min_size=1, max_size=6)


class TestRows:
    @given(batches, batches, st.sampled_from([as_scheduled, shortest_first, backwards]))
    def test_of_every_request_are_where_the_runner_has_them_and_come_back_in_order(
        self, mine: list[int], theirs: list[int], order: Order
    ) -> None:
        tokens = [
            [(f"{tenant}/{place}", count) for place, count in enumerate(counts)]
            for tenant, counts in enumerate((mine, theirs))
        ]
        both = [*tokens[0], *tokens[1]]
        numbers = {request: float(place) for place, request in enumerate(as_scheduled(both))}
        counts = dict(both)

        def hidden(requests: list[str]) -> torch.Tensor:
            """Every row says whose it is, and which of its request's."""
            return torch.tensor(
                [[numbers[request], float(row)] for request in requests for row in range(counts[request])]
            )

        where = spans(order(both), [order(each) for each in tokens], counts)
        inbound = [{"hidden": hidden(order(each)), "residual": -hidden(order(each))} for each in tokens]
        together = gather(where, inbound)
        assert torch.equal(together["hidden"], hidden(order(both)))
        assert torch.equal(together["residual"], -hidden(order(both)))
        for tenant, own in enumerate(inbound):
            back = scatter(where, tenant, together)
            assert back.keys() == own.keys()
            assert all(torch.equal(back[name], own[name]) for name in own)

    def test_of_two_tenants_that_decode_lie_in_one_span_each_and_are_not_copied(self) -> None:
        tokens = [[(f"{tenant}/{place}", 1) for place in range(4)] for tenant in range(2)]
        both = [*tokens[0], *tokens[1]]
        where = spans(shortest_first(both), [shortest_first(each) for each in tokens], dict(both))
        assert where == [Span(tenant=0, own=0, merged=0, rows=4), Span(tenant=1, own=0, merged=4, rows=4)]
        hidden = torch.zeros(8, 3)
        assert scatter(where, 1, {"hidden": hidden})["hidden"].data_ptr() == hidden[4:].data_ptr()

    def test_that_the_runner_padded_go_to_nobody(self) -> None:
        where = [Span(0, 0, 0, 1), Span(1, 0, 1, 2)]
        padded = {"hidden": torch.arange(8.0)}
        assert [scatter(where, tenant, padded)["hidden"].tolist() for tenant in (0, 1)] == [[0.0], [1.0, 2.0]]


def result(*requests: str, **changes: Any) -> StepResult:
    settings: dict[str, Any] = {
        "stamp": Stamp(1, 1),
        "step": 3,
        "requests": list(requests),
        "sampled_token_ids": [[place] for place in range(len(requests))],
        "logprobs": None,
        "prompt_logprobs": [],
        "num_nans": None,
    }
    return StepResult(**settings | changes)


def logprobs(rows: int, offsets: list[int] | None = None) -> Logprobs:
    """Row r has token ids 10r and 10r + 1."""
    ids = np.array([[10 * row, 10 * row + 1] for row in range(rows)], dtype=np.int32).reshape(rows, 2)
    return Logprobs(
        encode_array(ids),
        encode_array(-ids.astype(np.float32)),
        encode_array(np.arange(rows, dtype=np.int64)),
        offsets,
    )


class TestEachTenantsShare:
    def test_has_its_own_requests_and_bears_its_own_steps_name(self) -> None:
        both = result("0/a", "1/a", "0/b", "11/a")
        assert share(both, "0/", Stamp(7, 8), 9) == result(
            "0/a", "0/b", stamp=Stamp(7, 8), step=9, sampled_token_ids=[[0], [2]]
        )
        assert share(both, "1/", Stamp(1, 1), 3).requests == ["1/a"], "instance 11 is another"

    def test_has_no_tokens_where_none_were_sampled(self) -> None:
        assert share(result("0/a", "1/a", sampled_token_ids=[]), "1/", Stamp(1, 1), 3).sampled_token_ids == []

    @pytest.mark.parametrize(("prefix", "rows"), [("0/", [0, 2]), ("1/", [1])])
    def test_has_the_logprobs_of_its_own_rows(self, prefix: str, rows: list[int]) -> None:
        own = share(result("0/a", "1/a", "0/b", logprobs=logprobs(3)), prefix, Stamp(1, 1), 3).logprobs
        assert own is not None and own.offsets is None
        assert decode_array(own.token_ids).tolist() == [[10 * row, 10 * row + 1] for row in rows]
        assert decode_array(own.logprobs).tolist() == [[-10.0 * row, -10.0 * row - 1] for row in rows]
        assert decode_array(own.ranks).tolist() == rows

    @pytest.mark.parametrize("offsets", [[0, 2, 3], [0, 2, 3, 5]], ids=["starts", "bounds"])
    def test_has_as_many_rows_of_a_request_as_there_are(self, offsets: list[int]) -> None:
        own = share(result("0/a", "1/a", "0/b", logprobs=logprobs(5, offsets)), "0/", Stamp(1, 1), 3).logprobs
        assert own is not None
        assert decode_array(own.ranks).tolist() == [0, 1, 3, 4]
        assert own.offsets == [0, 2, 4]

    def test_may_be_without_any_logprobs(self) -> None:
        own = share(result("0/a", logprobs=logprobs(1)), "1/", Stamp(1, 1), 3)
        assert own.logprobs is not None
        assert own.logprobs.token_ids.shape == (0, 2)

    def test_has_its_own_prompts_logprobs_and_counts(self) -> None:
        both = result(
            "0/a",
            "1/a",
            prompt_logprobs=[("0/a", logprobs(1)), ("1/a", logprobs(2))],
            num_nans=[("0/a", 0), ("1/a", 4)],
        )
        own = share(both, "1/", Stamp(1, 1), 3)
        assert own.prompt_logprobs == [("1/a", logprobs(2))]
        assert own.num_nans == [("1/a", 4)]
