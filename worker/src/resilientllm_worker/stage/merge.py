"""One step for the runner out of one step each of home and guest, and each tenant's share of what comes of it.

Pure functions on steps that are translated already, so that no request id and no slot is in two of them.

Hidden states carry no names: a row is known by its place alone. A tenant's rows come, and go on, in the order that the
runner gives to that tenant's step alone; in the merged step they lie wherever the runner puts them. `spans` says where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
import torch

from resilientllm_worker.protocol.messages import CachedRequests, Grammar, Logprobs, Stamp, Step, StepResult
from resilientllm_worker.seams.arrays import decode_array, encode_array
from resilientllm_worker.seams.errors import Malformed
from resilientllm_worker.seams.scheduler_output import check


class Room(NamedTuple):
    """What the runner's buffers were made for, in one step."""

    tokens: int
    requests: int


class Span(NamedTuple):
    """Rows of hidden states that lie together, both in the merged step and in their tenant's own."""

    tenant: int
    """As an index into the steps that were merged."""
    own: int
    """The first row in the tenant's own step."""
    merged: int
    """The first row in the merged step."""
    rows: int


def why_apart(steps: Sequence[Step], room: Room) -> str | None:
    """Why these steps cannot run in one forward, in words; None if they can. They need not be translated."""
    for step in steps:
        try:
            check(step)
        except Malformed as error:
            return f"one would be refused, and must be refused alone: {error}"
    tokens = sum(count for step in steps for _, count in step.num_scheduled_tokens)
    if tokens > room.tokens:
        return f"{tokens} tokens do not fit into a step of {room.tokens}"
    requests = sum(len(step.num_scheduled_tokens) for step in steps)
    if requests > room.requests:
        return f"{requests} requests do not fit into a step of {room.requests}"
    if not all(step.num_scheduled_tokens for step in steps):
        return "one has nothing to compute, so there are no hidden states of it"
    if len({len(step.cached.new_token_ids) > 0 for step in steps if step.cached.requests}) > 1:
        return "one sends sampled tokens with its requests and another does not"
    if len({step.grammar.columns for step in steps if step.grammar is not None}) > 1:
        return "their grammars are over different vocabularies"
    return None


def merged(steps: Sequence[Step]) -> Step:
    """The union of ``steps``, which `why_apart` must have let through. Its stamp and number are the first one's."""
    cached = [step.cached for step in steps]
    grammars = [step.grammar for step in steps if step.grammar is not None]
    return Step(
        stamp=steps[0].stamp,
        step=steps[0].step,
        new=[request for step in steps for request in step.new],
        cached=CachedRequests(
            requests=[request for part in cached for request in part.requests],
            new_token_ids=[tokens for part in cached for tokens in part.new_token_ids],
            new_block_ids=[groups for part in cached for groups in part.new_block_ids],
            num_computed_tokens=[count for part in cached for count in part.num_computed_tokens],
            num_output_tokens=[count for part in cached for count in part.num_output_tokens],
        ),
        num_scheduled_tokens=[request for step in steps for request in step.num_scheduled_tokens],
        finished=[request for step in steps for request in step.finished],
        preempted=[request for step in steps for request in step.preempted],
        zero_block_ids=[block for step in steps for block in step.zero_block_ids],
        block_copies=[copy for step in steps for copy in step.block_copies],
        grammar=_union(grammars) if grammars else None,
    )


def share(result: StepResult, prefix: str, stamp: Stamp, step: int) -> StepResult:
    """What a merged step's ``result`` says of requests with ``prefix``, as the result of their tenant's own step."""
    places = [place for place, request in enumerate(result.requests) if request.startswith(prefix)]
    tokens = result.sampled_token_ids
    return StepResult(
        stamp=stamp,
        step=step,
        requests=[result.requests[place] for place in places],
        sampled_token_ids=[tokens[place] for place in places] if tokens else [],
        logprobs=None if result.logprobs is None else _logprobs_of(places, result.logprobs),
        prompt_logprobs=[each for each in result.prompt_logprobs if each[0].startswith(prefix)],
        num_nans=None if result.num_nans is None else [each for each in result.num_nans if each[0].startswith(prefix)],
    )


# --- hidden states --------------------------------------------------------------------------------------------


def spans(order: Sequence[str], own_orders: Sequence[Sequence[str]], tokens: Mapping[str, int]) -> list[Span]:
    """Where the rows of each tenant's step are in the merged one, in the order of the merged rows.

    ``order`` is that of the requests in the merged step, ``own_orders`` are those in each tenant's step alone. A
    request has as many rows as ``tokens`` says. Rows that are neighbours in both are in one span.
    """
    places: dict[str, tuple[int, int]] = {}
    for tenant, requests in enumerate(own_orders):
        own = 0
        for request in requests:
            places[request] = tenant, own
            own += tokens[request]
    found: list[Span] = []
    of, begin, end, row = -1, 0, 0, 0
    for request in order:
        tenant, own = places[request]
        if tenant != of or own != end:
            if end > begin:
                found.append(Span(of, begin, row - (end - begin), end - begin))
            of, begin, end = tenant, own, own
        end += tokens[request]
        row += tokens[request]
    return [*found, Span(of, begin, row - (end - begin), end - begin)]


def gather(where: Sequence[Span], inbound: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The merged step's hidden states, out of those of each tenant's own step: all have the same names."""
    return {
        name: torch.cat([inbound[each.tenant][name][each.own : each.own + each.rows] for each in where])
        for name in inbound[0]
    }


def scatter(where: Sequence[Span], tenant: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``tenant``'s rows of the merged step's hidden states, as its own step has them. Views of them, if they lie so."""
    own = sorted((each for each in where if each.tenant == tenant), key=lambda each: each.own)
    parts = {name: [tensor[each.merged : each.merged + each.rows] for each in own] for name, tensor in tensors.items()}
    return {name: each[0] if len(each) == 1 else torch.cat(each) for name, each in parts.items()}


def _union(grammars: Sequence[Grammar]) -> Grammar:
    return Grammar(
        requests=[request for grammar in grammars for request in grammar.requests],
        bitmask=b"".join(grammar.bitmask for grammar in grammars),
        columns=grammars[0].columns,
    )


def _logprobs_of(places: Sequence[int], logprobs: Logprobs) -> Logprobs:
    """The rows of the requests at ``places``: one each, or from one offset to the next."""
    rows, offsets = list(places), None
    if logprobs.offsets is not None:
        bounds = [*logprobs.offsets, logprobs.ranks.shape[0]]
        rows, offsets = [], [0]
        for place in places:
            rows.extend(range(bounds[place], bounds[place + 1]))
            offsets.append(len(rows))
    return msgspec.structs.replace(
        logprobs,
        token_ids=encode_array(decode_array(logprobs.token_ids)[rows]),
        logprobs=encode_array(decode_array(logprobs.logprobs)[rows]),
        ranks=encode_array(decode_array(logprobs.ranks)[rows]),
        offsets=offsets,
    )
