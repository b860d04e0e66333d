"""vLLM's objects, of which a test states only what it is about."""

from __future__ import annotations

from typing import Any

from resilientllm_worker.protocol.messages import Message, Stamp
from resilientllm_worker.transport.frame import HEADER_BYTES, Limits, decode_message, encode_frame
from vllm import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

STAMP = Stamp(2, 5)


def over_the_wire(message: Message) -> Any:
    """``message`` as the peer gets it."""
    (frame,) = encode_frame(message, (), Limits())
    return decode_message(frame[HEADER_BYTES:])


def a_new_request(request: str = "n", **changes: Any) -> NewRequestData:
    settings: dict[str, Any] = {
        "req_id": request,
        "prompt_token_ids": [11, 12, 13],
        "mm_features": [],
        "sampling_params": SamplingParams(temperature=0.5, seed=3),
        "pooling_params": None,
        "block_ids": ([1, 2],),
        "num_computed_tokens": 0,
        "lora_request": None,
        "prefill_token_ids": [11, 12, 13],
    }
    return NewRequestData(**settings | changes)


def a_scheduler_output(*new: NewRequestData, **changes: Any) -> SchedulerOutput:
    """The new requests given, and a running one."""
    cached = CachedRequestData(["c"], set(), [[5]], {}, [([7],)], [9], [4])
    tokens = {request.req_id: 3 for request in new} | {"c": 1}
    settings: dict[str, Any] = {
        "scheduled_new_reqs": list(new),
        "scheduled_cached_reqs": cached,
        "num_scheduled_tokens": tokens,
        "total_num_scheduled_tokens": sum(tokens.values()),
        "scheduled_spec_decode_tokens": {},
        "scheduled_encoder_inputs": {},
        "finished_req_ids": set(),
        "free_encoder_mm_hashes": [],
        "preempted_req_ids": set(),
    }
    return SchedulerOutput(**settings | changes)
