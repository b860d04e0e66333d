"""vLLM's SchedulerOutput and GrammarOutput, to and from the wire's `Step`.

Made for vLLM 0.32 with ``scheduler.use_v2_model_runner = True`` whichever runner serves. Resumed requests then come as
new ones with all their tokens, so ``resumed_req_ids`` and ``all_token_ids`` are empty and have no place on the wire.
The contract tests pin every field: one that is neither carried, refused nor listed here must be looked at.

Not carried, and not needed by a stage:
    total_num_scheduled_tokens     the sum of num_scheduled_tokens
    has_structured_output_requests, num_acceptable_drafts, num_invalid_spec_tokens, num_spec_tokens_to_schedule
                                   matter to speculative decoding only, which `unsupported` refuses
    pending_structured_output_tokens, scheduled_encoder_input_stats, kv_connector_block_state
                                   the engine's own
    num_common_prefix_blocks       always empty
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import msgspec
import numpy as np
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
from vllm.v1.core.sched.output import CachedRequestData, GrammarOutput, NewRequestData, SchedulerOutput
from vllm.v1.request import Request

from resilientllm_worker.protocol.messages import CachedRequests, Grammar, NewRequest, Stamp, Step
from resilientllm_worker.seams.errors import Malformed, Unsupported

_encoder = msgspec.msgpack.Encoder()
_params_decoder = msgspec.msgpack.Decoder(SamplingParams)


def unsupported(scheduler_output: SchedulerOutput) -> str | None:
    """What of this step our wire cannot carry, in words for the log and the client; None if it can carry all."""
    if (found := _unsupported_in_batch(scheduler_output)) is not None:
        return found
    for request in scheduler_output.scheduled_new_reqs:
        if (found := unsupported_in_request(request)) is not None:
            return f"request {request.req_id}: {found}"
    return None


def send_anew(scheduler_output: SchedulerOutput, requests: Mapping[str, NewRequestData]) -> None:
    """``requests`` run already, but no stage knows them: the step introduces them.

    They are in it, as cached requests. ``num_computed_tokens`` is taken from there: it is ahead by now elsewhere.
    """
    cached = scheduler_output.scheduled_cached_reqs
    for place, name in enumerate(cached.req_ids):
        if name in requests:
            computed = cached.num_computed_tokens[place]
            scheduler_output.scheduled_new_reqs.append(
                dataclasses.replace(requests[name], num_computed_tokens=computed)
            )
    left = [place for place, name in enumerate(cached.req_ids) if name not in requests]
    scheduler_output.scheduled_cached_reqs = dataclasses.replace(
        cached,
        req_ids=[cached.req_ids[place] for place in left],
        new_token_ids=[cached.new_token_ids[place] for place in left] if cached.new_token_ids else [],
        new_block_ids=[cached.new_block_ids[place] for place in left],
        num_computed_tokens=[cached.num_computed_tokens[place] for place in left],
        num_output_tokens=[cached.num_output_tokens[place] for place in left],
    )


def encode_step(
    scheduler_output: SchedulerOutput, grammar_output: GrammarOutput | None, stamp: Stamp, step: int
) -> Step:
    """The step for the wire. Check it with `unsupported` first: what that names is not looked at here.

    Lists that vLLM goes on to change are copied; the rest are shared with ``scheduler_output``.

    Raises:
        Unsupported: sampling parameters hold an object that has no encoding.
    """
    cached = scheduler_output.scheduled_cached_reqs
    return Step(
        stamp=stamp,
        step=step,
        new=[_encode_new(request) for request in scheduler_output.scheduled_new_reqs],
        cached=CachedRequests(
            requests=cached.req_ids,
            new_token_ids=cached.new_token_ids,
            new_block_ids=cached.new_block_ids,
            num_computed_tokens=cached.num_computed_tokens,
            num_output_tokens=cached.num_output_tokens,
        ),
        num_scheduled_tokens=list(scheduler_output.num_scheduled_tokens.items()),
        finished=list(scheduler_output.finished_req_ids),
        preempted=list(scheduler_output.preempted_req_ids or ()),
        zero_block_ids=scheduler_output.new_block_ids_to_zero or [],
        block_copies=[(copy[0], copy[1]) for copy in scheduler_output.kv_cache_block_copies or ()],
        grammar=None if grammar_output is None else _encode_grammar(grammar_output),
    )


def decode_step(step: Step) -> tuple[SchedulerOutput, GrammarOutput | None]:
    """What the model runner is to do, for ``execute_model`` and ``sample_tokens``.

    Raises:
        Malformed: the parts contradict each other, or sampling parameters are not those of the installed vLLM.
    """
    check(step)
    scheduled = dict(step.num_scheduled_tokens)
    cached = step.cached
    output = SchedulerOutput(
        scheduled_new_reqs=[_decode_new(request) for request in step.new],
        scheduled_cached_reqs=CachedRequestData(
            req_ids=cached.requests,
            resumed_req_ids=set(),
            new_token_ids=cached.new_token_ids,
            all_token_ids={},
            new_block_ids=cached.new_block_ids,
            num_computed_tokens=cached.num_computed_tokens,
            num_output_tokens=cached.num_output_tokens,
        ),
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
        scheduled_spec_decode_tokens={},
        scheduled_encoder_inputs={},
        finished_req_ids=set(step.finished),
        free_encoder_mm_hashes=[],
        preempted_req_ids=set(step.preempted),
        has_structured_output_requests=step.grammar is not None,
        new_block_ids_to_zero=step.zero_block_ids or None,
        kv_cache_block_copies=[KVCacheBlockCopy(*copy) for copy in step.block_copies] or None,
    )
    return output, None if step.grammar is None else _decode_grammar(step.grammar)


def check(step: Step) -> None:
    """Raises `Malformed` where the runner would fail in the middle of a step, or misread one list against another."""
    cached, grammar = step.cached, step.grammar
    scheduled = dict(step.num_scheduled_tokens)
    count = len(cached.requests)
    lengths = (len(cached.new_block_ids), len(cached.num_computed_tokens), len(cached.num_output_tokens))
    # Without pipeline parallelism, or with async scheduling, vLLM sends no token ids.
    if any(length != count for length in lengths) or len(cached.new_token_ids) not in (0, count):
        raise Malformed(f"step {step.step}: lists of {count} cached requests have other lengths than that")
    if len(scheduled) != len(step.num_scheduled_tokens) or len(scheduled) != count + len(step.new):
        raise Malformed(
            f"step {step.step}: expected token counts for {count} cached and {len(step.new)} new requests, "
            f"found {len(step.num_scheduled_tokens)}, {len(scheduled)} of them distinct"
        )
    if not (scheduled.keys() >= set(cached.requests) and all(new.request in scheduled for new in step.new)):
        raise Malformed(f"step {step.step}: a request comes without a token count")
    if any(tokens < 1 for tokens in scheduled.values()):
        raise Malformed(f"step {step.step}: a request is scheduled for less than one token")
    if grammar is not None and (
        grammar.columns < 1 or len(grammar.bitmask) != len(grammar.requests) * grammar.columns * 4
    ):
        raise Malformed(
            f"expected a grammar bitmask of {len(grammar.requests)} rows of {grammar.columns} int32, "
            f"found {len(grammar.bitmask)} bytes"
        )


def _unsupported_in_batch(output: SchedulerOutput) -> str | None:
    cached = output.scheduled_cached_reqs
    if cached.resumed_req_ids or cached.all_token_ids:
        return "resumed requests as cached ones (the scheduler must have use_v2_model_runner set)"
    if output.scheduled_spec_decode_tokens or output.num_invalid_spec_tokens or output.num_spec_tokens_to_schedule:
        return "speculative decoding"
    if output.scheduled_encoder_inputs or output.free_encoder_mm_hashes:
        return "multimodal encoder inputs"
    if output.kv_connector_metadata is not None or output.has_sync_kv_loads:
        return "a KV connector"
    if output.ec_connector_metadata is not None or output.ec_manager_metadata is not None:
        return "an encoder cache connector"
    if output.aux_output_connector_metadata is not None:
        return "an auxiliary output connector"
    return None


def unsupported_in_request(request: NewRequestData | Request) -> str | None:
    """What of a request our wire cannot carry. Ask when it arrives: once it is in a batch, it is too late to refuse."""
    if request.mm_features:
        return "multimodal features"
    if request.pooling_params is not None or request.sampling_params is None:
        return "pooling"
    if request.lora_request is not None:
        return "LoRA"
    if request.prompt_embeds is not None or request.prompt_token_ids is None or request.prompt_is_token_ids is not None:
        return "prompt embeddings"
    if request.replay_start:
        return "bounded replay of sliding windows"
    if request.sampling_params.prompt_logprob_token_ids is not None:
        return "prompt_logprob_token_ids"
    try:
        _encoder.encode(request.sampling_params)
    except (TypeError, ValueError, OverflowError) as error:
        return f"sampling parameters that have no encoding ({error})"
    return None


def _encode_new(request: NewRequestData) -> NewRequest:
    try:
        # Not kept per object: that costs about as much as encoding, and a request is sent whole but once or twice.
        params = _encoder.encode(request.sampling_params)
    except (TypeError, ValueError, OverflowError) as error:
        raise Unsupported(f"request {request.req_id}: sampling parameters that have no encoding: {error}") from error
    prompt, prefill = request.prompt_token_ids, request.prefill_token_ids
    # The scheduler gives its own list of the request's tokens, and appends to it. Fresh requests need it once only.
    resumed = prefill is not None and len(prefill) > len(prompt)
    return NewRequest(
        request=request.req_id,
        prompt_token_ids=prompt,
        prefill_token_ids=list(prefill) if resumed else None,
        sampling_params=params,
        block_ids=request.block_ids,
        num_computed_tokens=request.num_computed_tokens,
    )


def _decode_new(request: NewRequest) -> NewRequestData:
    try:
        params = _params_decoder.decode(request.sampling_params)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        raise Malformed(f"request {request.request}: sampling parameters cannot be read: {error}") from error
    return NewRequestData(
        req_id=request.request,
        prompt_token_ids=request.prompt_token_ids,
        mm_features=[],
        sampling_params=params,
        pooling_params=None,
        block_ids=request.block_ids,
        num_computed_tokens=request.num_computed_tokens,
        lora_request=None,
        prefill_token_ids=(
            request.prompt_token_ids if request.prefill_token_ids is None else request.prefill_token_ids
        ),
    )


def _encode_grammar(grammar: GrammarOutput) -> Grammar:
    bitmask = grammar.grammar_bitmask  # a view of memory that the next step overwrites; tobytes copies
    return Grammar(
        requests=grammar.structured_output_request_ids,
        bitmask=bitmask.astype(np.int32, copy=False).tobytes(),
        columns=bitmask.shape[1],
    )


def _decode_grammar(grammar: Grammar) -> GrammarOutput:
    rows = len(grammar.requests)
    bitmask = np.frombuffer(bytearray(grammar.bitmask), dtype=np.int32)  # writable: torch warns of others
    return GrammarOutput(grammar.requests, bitmask.reshape(rows, grammar.columns), [0] * rows)
