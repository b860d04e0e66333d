"""Seam: vLLM's V1 model runner (what plain CPU builds run), in V2's clothes.

V1 tells new requests from resumed ones and expects state of a resumed one to be there. Here every request that comes
back arrives as new with all its tokens; those with output get the state that V1 would have had, including the
position of their random generator, which no other process can know.

V1 keeps the rows of its batch from step to step, in an order that comes from what it ran before, and hidden states
carry no names. Two stages agree on the order only while both see the same steps, and a donor sees two tenants'. So
every step's rows are put into the order of the step itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingType
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.worker.gpu_input_batch import CachedRequestState


class RunnerV1:
    def before_construction(self, config: VllmConfig) -> None:
        pass

    def after_allocation(self, runner: Any) -> None:
        from vllm.distributed.parallel_state import get_pp_group

        _keep_rows_in_order(runner)
        if get_pp_group().is_first_rank or runner.intermediate_tensors is not None:
            return
        # V1 makes this buffer in its first dummy run, and has none where nothing is profiled or compiled, as on a CPU
        # with a KV cache of given size.
        runner.intermediate_tensors = runner.get_model().make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.dtype, device=runner.device
        )

    def prepare(self, runner: Any, output: SchedulerOutput) -> SchedulerOutput:
        if not output.scheduled_new_reqs:
            return output
        fresh: list[NewRequestData] = []
        back: list[tuple[NewRequestData, list[int]]] = []
        finished = set(output.finished_req_ids)
        for new in output.scheduled_new_reqs:
            assert new.prompt_token_ids is not None
            outputs = (new.prefill_token_ids or ())[len(new.prompt_token_ids) :]
            if outputs:
                back.append((new, list(outputs)))
                continue
            if new.req_id in runner.requests:
                finished.add(new.req_id)  # stepped back before its first token: V1 must not find the old state
            fresh.append(new)
        if not back:
            return dataclasses.replace(output, scheduled_new_reqs=fresh, finished_req_ids=finished)
        for new, outputs in back:
            if new.req_id in runner.input_batch.req_id_to_index:
                # V1 asserts that a resumed request is not in the batch; it was, if it is stepped back without a pause.
                runner.input_batch.remove_request(new.req_id)
            runner.requests[new.req_id] = CachedRequestState(
                req_id=new.req_id,
                prompt_token_ids=new.prompt_token_ids,
                mm_features=new.mm_features,
                sampling_params=new.sampling_params,
                generator=_generator_after(runner, new, len(outputs)),
                block_ids=new.block_ids,
                num_computed_tokens=new.num_computed_tokens,
                output_token_ids=outputs,
                lora_request=new.lora_request,
            )
        cached = output.scheduled_cached_reqs
        ids = [new.req_id for new, _ in back]
        return dataclasses.replace(
            output,
            scheduled_new_reqs=fresh,
            finished_req_ids=finished - set(ids),
            scheduled_cached_reqs=CachedRequestData(
                req_ids=cached.req_ids + ids,
                resumed_req_ids=cached.resumed_req_ids | set(ids),
                # Only its tail matters, and only on stages that did not sample: all tokens are in place already.
                new_token_ids=(cached.new_token_ids or [[] for _ in cached.req_ids]) + [[] for _ in ids],
                all_token_ids=cached.all_token_ids,
                new_block_ids=cached.new_block_ids + [new.block_ids for new, _ in back],
                num_computed_tokens=cached.num_computed_tokens + [new.num_computed_tokens for new, _ in back],
                num_output_tokens=cached.num_output_tokens + [len(outputs) for _, outputs in back],
            ),
        )

    def before_sampling(self, runner: Any) -> None:
        if runner.device.type != "cpu" or not runner.input_batch.generators:
            return
        batch = runner.input_batch
        for row, generator in list(batch.generators.items()):
            if not isinstance(generator, RewindableGenerator):
                rewindable = RewindableGenerator(generator)
                batch.generators[row] = rewindable
                runner.requests[batch.req_ids[row]].generator = rewindable
            batch.generators[row].mark()

    def knows_rows(self, runner: Any) -> bool:
        # An attention backend that has a threshold wants some requests first, and chooses them by V1's own state.
        return runner.reorder_batch_threshold is None

    def row_order(self, runner: Any, tokens: dict[str, int]) -> list[str]:
        return list(tokens)

    def requests(self, runner: Any) -> Collection[str]:
        return tuple(runner.requests)


def _keep_rows_in_order(runner: Any) -> None:
    """V1 calls ``_may_reorder_batch`` when all rows are there, and before it makes anything of them."""
    stock = runner._may_reorder_batch

    def reorder(output: SchedulerOutput) -> None:
        put_in_order(runner.input_batch, output.num_scheduled_tokens)
        # What the attention backend wants of the order follows from the step too, if it starts from the same.
        stock(output)

    runner._may_reorder_batch = reorder


def put_in_order(batch: Any, requests: Iterable[str]) -> None:
    """Make ``requests``, which are all that are in the batch, its rows 0, 1, 2, …"""
    for row, request in enumerate(requests):
        found = batch.req_id_to_index[request]
        if found != row:
            batch.swap_states(row, found)


class RewindableGenerator(torch.Generator):
    """A CPU generator that can take back the draw of one step.

    V1 samples for every row and takes the draw back for rows that were not at their last prefill chunk, by setting the
    generator's offset, which CPU generators do not have: it raises (vllm/v1/worker/gpu_model_runner.py,
    ``_bookkeeping_sync``). Recomputation makes such chunks of requests that were never chunked before.
    """

    def __new__(cls, origin: torch.Generator) -> RewindableGenerator:
        return super().__new__(cls, "cpu")

    def __init__(self, origin: torch.Generator) -> None:
        self.set_state(origin.get_state())
        self.mark()

    def mark(self) -> None:
        self._marked = self.get_state()

    def get_offset(self) -> int:
        return 4

    def set_offset(self, offset: int) -> None:
        self.set_state(self._marked)


def _generator_after(runner: Any, new: NewRequestData, drawn: int) -> torch.Generator | None:
    """The request's generator as it stands after ``drawn`` sampled tokens.

    On CPU, V1 draws one ``randint(0, 2**31, (1,))`` for each sampled token (vllm/v1/sample/ops/topk_topp_sampler.py),
    and ``randint`` of n advances a generator exactly as n single draws. On CUDA it fills a row of logits.
    """
    params = new.sampling_params
    if params is None or params.sampling_type != SamplingType.RANDOM_SEED:
        return None
    generator = torch.Generator(device=runner.device)
    generator.manual_seed(params.seed)
    if runner.device.type == "cpu":
        torch.randint(0, 2**31, (drawn,), generator=generator)
    else:
        row = torch.empty(runner.input_batch.vocab_size, dtype=torch.float32, device=runner.device)
        for _ in range(drawn):
            row.exponential_(generator=generator)
    return generator
