"""Steps and results, between an engine's names and those in the shared model runner.

Request ids get the tenant's prefix, so that equal ids of two engines stay apart; block ids become slots. Every list
with a block id is new, because vLLM's runner keeps and extends those that it gets.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from resilientllm_worker.protocol.messages import CachedRequests, Grammar, NewRequest, Step, StepResult
from resilientllm_worker.tenancy.blocks import Blocks
from resilientllm_worker.tenancy.errors import ForeignRequest


def to_runner(step: Step, prefix: str, blocks: Blocks, block_size: int) -> Step:
    """``step`` as the runner is to see it. ``block_size`` is in tokens, the same for all KV cache groups.

    Raises:
        TranslationError: the step reads or needs blocks that the tenant does not have here. No slot was taken.
    """
    read, written = _blocks_of(step, block_size)
    if read or written:
        blocks.admit(read, written)
    return Step(
        stamp=step.stamp,
        step=step.step,
        new=[_new(request, prefix, blocks) for request in step.new],
        cached=_cached(step.cached, prefix, blocks),
        num_scheduled_tokens=[(prefix + request, tokens) for request, tokens in step.num_scheduled_tokens],
        finished=_prefixed(step.finished, prefix),
        preempted=_prefixed(step.preempted, prefix),
        # A block that was taken and given back within one schedule() is listed, but nobody uses it.
        zero_block_ids=blocks.translate([block for block in step.zero_block_ids if block in blocks]),
        block_copies=[_pair(blocks.translate(list(pair))) for pair in step.block_copies],
        grammar=_grammar(step.grammar, prefix),
    )


def from_runner(result: StepResult, prefix: str) -> StepResult:
    """``result`` as the tenant's engine is to see it.

    Raises:
        ForeignRequest: the result names a request without this prefix.
    """
    return msgspec.structs.replace(
        result,
        requests=[_unprefixed(request, prefix) for request in result.requests],
        prompt_logprobs=[(_unprefixed(request, prefix), logprobs) for request, logprobs in result.prompt_logprobs],
        num_nans=(
            None
            if result.num_nans is None
            else [(_unprefixed(request, prefix), count) for request, count in result.num_nans]
        ),
    )


def written_blocks(step: Step, block_size: int) -> list[int]:
    """The engine's ids of all blocks whose content ``step`` changes; a block may be named twice, or be unknown here."""
    _, written = _blocks_of(step, block_size)
    for request in step.new:
        # The step goes on with a block that is filled in part, though it must have content.
        begun, filled = divmod(request.num_computed_tokens, block_size)
        if filled:
            for group in request.block_ids:
                written += group[begun : begun + 1]
    return written + step.zero_block_ids


def _blocks_of(step: Step, block_size: int) -> tuple[list[int], list[int]]:
    """The blocks that must have content, and those that need a slot because the step writes them.

    A request that is new to the runner may come with a computed prefix, whose blocks must have content; the last of
    them too if it is only partly filled.
    """
    read: list[int] = []
    written: list[int] = []
    for request in step.new:
        hits = -(-request.num_computed_tokens // block_size)
        for group in request.block_ids:
            read += group[:hits]
            written += group[hits:]
    for groups in step.cached.new_block_ids:
        if groups is not None:
            for group in groups:
                written += group
    for source, target in step.block_copies:
        read.append(source)
        written.append(target)
    return read, written


def _new(request: NewRequest, prefix: str, blocks: Blocks) -> NewRequest:
    return NewRequest(
        request=prefix + request.request,
        prompt_token_ids=request.prompt_token_ids,
        prefill_token_ids=request.prefill_token_ids,
        sampling_params=request.sampling_params,
        block_ids=_groups(request.block_ids, blocks),
        num_computed_tokens=request.num_computed_tokens,
    )


def _cached(cached: CachedRequests, prefix: str, blocks: Blocks) -> CachedRequests:
    return CachedRequests(
        requests=_prefixed(cached.requests, prefix),
        new_token_ids=cached.new_token_ids,
        new_block_ids=[None if groups is None else _groups(groups, blocks) for groups in cached.new_block_ids],
        num_computed_tokens=cached.num_computed_tokens,
        num_output_tokens=cached.num_output_tokens,
    )


def _grammar(grammar: Grammar | None, prefix: str) -> Grammar | None:
    if grammar is None:
        return None
    return Grammar(_prefixed(grammar.requests, prefix), grammar.bitmask, grammar.columns)


def _groups(groups: Iterable[list[int]], blocks: Blocks) -> tuple[list[int], ...]:
    return tuple([blocks.translate(group) for group in groups])


def _pair(slots: list[int]) -> tuple[int, int]:
    source, target = slots
    return source, target


def _prefixed(requests: list[str], prefix: str) -> list[str]:
    return [prefix + request for request in requests]


def _unprefixed(request: str, prefix: str) -> str:
    if not request.startswith(prefix):
        raise ForeignRequest(f"expected a request of tenant {prefix!r}, found {request!r}")
    return request[len(prefix) :]
