"""The messages of the command channel (engine and stage) and of the links (stage to stage).

Every message that acts for an instance carries ``(term, epoch)``: a stage obeys only the highest it has seen, so
that a late message of an older topology or of a replaced engine changes nothing. Who the message is for needs no
field: a connection speaks for the one instance that its hello named.

A frame on a connection is one message, and for `Activation` the tensors' own memory behind it.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

PROTOCOL_VERSION = 1


class Stamp(NamedTuple):
    """Incarnation of an instance's engine, and version of the instance's topology; compared in this order."""

    term: int
    epoch: int


class _Struct(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=True):
    """An array on the wire, tagged with its name; plain data, so never part of a reference cycle."""


# --- hello ----------------------------------------------------------------------------------------------------


class EngineHello(_Struct):
    """First message of an engine. ``config_digest`` names all of vLLM's settings that change results or shapes."""

    protocol: int
    instance: int
    config_digest: str
    heartbeat_interval_seconds: float


class StageWelcome(_Struct):
    """The stage's answer to `EngineHello`."""

    protocol: int
    instance: int
    stage: int
    stages: int
    tensor_parallel: int
    boot: str
    """Random name of this incarnation of the process: another one has lost all KV."""
    config_digest: str
    stamp: Stamp
    """The highest that this stage has seen for the engine's instance."""
    home_blocks: int
    """KV blocks that the stage's own instance may use; 0 until its engine has agreed them."""
    pool_blocks: int
    """KV blocks for guests; 0 until then."""


class LinkHello(_Struct):
    """First message of the previous stage of ``instance``; nothing is answered."""

    protocol: int
    instance: int
    stage: int
    stamp: Stamp
    rank: int


# --- attaching ------------------------------------------------------------------------------------------------


class DescribeKV(_Struct):
    """Asks what the stage's layers need of a KV cache."""

    call: int


class KVDescription(_Struct):
    call: int
    specs: list[list[tuple[str, bytes]]]
    """For every rank: layer name and encoded KVCacheSpec."""
    layouts: list[list[str]]
    """For every rank: the KV layouts that all its layers support."""
    available_bytes: list[int]
    tasks: list[str]


class AllocateKV(_Struct):
    """Agrees the KV cache. Repeating it with the same figures changes nothing and resets nothing."""

    call: int
    layout: str
    home_blocks: int
    groups: list[list[str]]
    """Layer names of every KV cache group, of this stage only."""


class KVAllocated(_Struct):
    call: int
    home_blocks: int
    pool_blocks: int
    language_model_seconds: float
    encoder_seconds: float


class Failed(_Struct):
    """Answer to a call that could not be done."""

    call: int
    reason: str
    unreachable: int | None = None
    """The place of the stage that could not be linked to, if that is why: it is the suspect, not who answers."""


# --- topology -------------------------------------------------------------------------------------------------


class Fence(_Struct):
    """Void everything older than ``stamp``: queued steps, activations, links, request state of this instance."""

    stamp: Stamp


class Stitch(_Struct):
    """Serve this instance in the pipeline of ``stamp``. Answered by `Stitched`, or `Failed`."""

    call: int
    stamp: Stamp
    next_address: str | None
    """Where the next stage listens; None for the last stage."""


class Stitched(_Struct):
    call: int
    stamp: Stamp
    capacity_blocks: int
    """KV blocks this instance may use here."""


class Release(_Struct):
    """The instance has left this stage: forget it, free its blocks."""

    stamp: Stamp


class LinkLost(_Struct):
    """A stage tells the engine that its neighbour's link broke. ``stage`` is the neighbour's place."""

    stamp: Stamp
    stage: int
    detail: str


class Heartbeat(_Struct):
    """That the process lives, and how its work goes. A thread of its own sends it: a hang shows in ``step_seconds``."""

    steps_done: int
    """Steps of all tenants that the runner has finished."""
    step_seconds: float
    """How long the step at hand has been running; 0 when idle."""
    has_kv: bool
    """The KV cache is allocated, so the stage could serve at once."""


class StageFailing(_Struct):
    """The stage met an error that it cannot serve after, and exits."""

    reason: str


# --- steps ----------------------------------------------------------------------------------------------------


class NewRequest(_Struct):
    """A request as the runner first sees it here: fresh, resumed or moved, always with all its tokens."""

    request: str
    prompt_token_ids: list[int]
    prefill_token_ids: list[int] | None
    """Prompt and output so far, for a resumed request; None if only the prompt is known."""
    sampling_params: bytes
    block_ids: tuple[list[int], ...]
    num_computed_tokens: int


class CachedRequests(_Struct):
    """Requests the runner knows; parallel lists."""

    requests: list[str]
    new_token_ids: list[list[int]]
    new_block_ids: list[tuple[list[int], ...] | None]
    num_computed_tokens: list[int]
    num_output_tokens: list[int]


class Grammar(_Struct):
    requests: list[str]
    bitmask: bytes
    """int32, one row for each request."""
    columns: int


class Step(_Struct):
    """One scheduled batch: vLLM's SchedulerOutput, the fields that a stage needs, and the grammar for sampling."""

    stamp: Stamp
    step: int
    """Counts up within a stamp."""
    new: list[NewRequest]
    cached: CachedRequests
    num_scheduled_tokens: list[tuple[str, int]]
    """In batch order."""
    finished: list[str]
    preempted: list[str]
    zero_block_ids: list[int]
    block_copies: list[tuple[int, int]]
    grammar: Grammar | None


class Array(_Struct):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Logprobs(_Struct):
    token_ids: Array
    logprobs: Array
    ranks: Array
    offsets: list[int] | None


class StepResult(_Struct):
    """The last stage's answer to a `Step`."""

    stamp: Stamp
    step: int
    requests: list[str]
    sampled_token_ids: list[list[int]]
    logprobs: Logprobs | None
    prompt_logprobs: list[tuple[str, Logprobs]]
    num_nans: list[tuple[str, int]] | None


class StepFailed(_Struct):
    """A stage could not do a step of this stamp, though it lives and its links too."""

    stamp: Stamp
    step: int
    reason: str


class TensorHeader(_Struct):
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Activation(_Struct):
    """Hidden states for a step; the tensors' memory follows in this order."""

    stamp: Stamp
    step: int
    tensors: list[TensorHeader]


Message = (
    EngineHello
    | StageWelcome
    | LinkHello
    | DescribeKV
    | KVDescription
    | AllocateKV
    | KVAllocated
    | Failed
    | Fence
    | Stitch
    | Stitched
    | Release
    | LinkLost
    | Heartbeat
    | StageFailing
    | Step
    | StepResult
    | StepFailed
    | Activation
)
