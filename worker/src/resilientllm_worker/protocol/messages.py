"""The messages of the command channel (engine and stage), of links, replica channels and weights (stage to stage).

Every message that acts for an instance carries ``(term, epoch)``: a stage obeys only the highest it has seen, so
that a late message of an older topology or of a replaced engine changes nothing. Who the message is for needs no
field: a connection speaks for the one instance that its hello named.

A frame on a connection is one message, and for `Activation`, `Replicas` and `Weights` the memory that it describes
behind it.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

PROTOCOL_VERSION = 5


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
    step_floor_seconds: float
    """No step is overdue before."""


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


class KVGroup(_Struct):
    """Layers that share a block table, as the engine has planned it for the whole model."""

    layers: list[str]
    """Those of this stage; it may have none of a group."""
    spec: bytes
    """The encoded KVCacheSpec of the group."""


class AllocateKV(_Struct):
    """Agrees the KV cache. Repeating it with the same figures changes nothing and resets nothing."""

    call: int
    layout: str
    home_blocks: int
    groups: list[KVGroup]
    """All of the model's, in the order in which steps list their blocks."""


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
    report_sealed: bool = False
    """Say which sealed blocks this stage holds: it was not in the pipeline before."""


class Stitched(_Struct):
    call: int
    stamp: Stamp
    capacity_blocks: int
    """KV blocks this instance may use here."""
    held_blocks: bytes = b""
    """int32, little-endian: the instance's sealed blocks whose content is here, if the stitch asked for them."""
    held_numbers: bytes = b""
    """int64, little-endian: for each of them the number of the seal that it was stored under."""


class Release(_Struct):
    """The instance has left this stage: forget it, free a guest's blocks. A stage that leaves may end, as far as this
    instance goes."""

    stamp: Stamp


class LinkLost(_Struct):
    """A stage tells the engine that its neighbour's link broke. ``stage`` is the neighbour's place."""

    stamp: Stamp
    stage: int
    detail: str


class Progress(_Struct):
    """How far a stage has come with the steps of one instance, under the stamp that it obeys. -1: with none yet.

    Facts only: what should have come, the engine knows. Bytes are those that the kernel has received on the connection
    at hand, so that what comes slowly can be told from what does not come.
    """

    stamp: Stamp
    received: int
    """The highest step whose command is here."""
    landed: int
    """The highest step whose hidden states are here."""
    done: int
    """The highest step that has been through the runner."""
    command_bytes: int
    landed_bytes: int


class Pace(_Struct):
    """How long a stage's steps take, of all tenants."""

    steps: int
    """How many have been compared."""
    ratio: float
    """What the last ones took, over what steps of their size used to take."""
    sizes: list[tuple[int, float]]
    """What steps of a size used to take, in seconds. A size is a power of two."""


class Heartbeat(_Struct):
    """That the process lives, and how its work goes. A thread of its own sends it: a hang shows in ``step_seconds``."""

    steps_done: int
    """Steps of all tenants that the runner has finished."""
    step_seconds: float
    """How long the step at hand has been running, but for waiting until an earlier one's hidden states have left; 0
    when idle."""
    has_kv: bool
    """The KV cache is allocated, so the stage could serve at once."""
    replication: ReplicationReport | None = None
    """Of the instance whose engine gets this; None if this stage does not serve it."""
    progress: Progress | None = None
    """The same."""
    step_allowed_seconds: float = 0.0
    """How long the step at hand may run before it counts as stuck; 0 when idle."""
    pace: Pace | None = None
    """None as long as too few steps are known."""


class StageFailing(_Struct):
    """The stage met an error that it cannot serve after, and exits."""

    reason: str


class StageLeaving(_Struct):
    """The stage was asked to end. It serves on until no instance needs it, but not for longer than it says."""

    seconds: float


# --- replication ----------------------------------------------------------------------------------------------


class Seal(_Struct):
    """One KV block that is computed on every stage, and full, or open in a planned move: its content stays until a step
    writes the block again."""

    number: int
    """Names this content of this block, from 1 upward; never used again within a term."""
    block: int
    """The engine's id of the block."""
    parent: int
    """The number of the block before it in the same context; 0 for the first. Without it this one is of no use."""
    depth: int
    """How many blocks are before it in its context."""
    owner: int
    """The request that filled it, as a number within the term."""
    key: bytes
    """vLLM's content hash of all tokens up to the end of this block: equal content has an equal key anywhere. Empty for
    an open block, whose content stays only until its request goes on."""


class Sealed(_Struct):
    """Tells a serving stage which blocks were sealed since the last such message; before any step that reuses one."""

    stamp: Stamp
    seals: list[Seal]
    ended: list[int]
    """Owners that have ended: their blocks are worth less than those of the others."""


class ReplicateTo(_Struct):
    """Tells a serving stage where this instance's sealed blocks are to be kept from now on; None for nowhere."""

    stamp: Stamp
    address: str | None


class Forget(_Struct):
    """Tells a stage that the engine has no use for the sealed content of these blocks."""

    stamp: Stamp
    blocks: bytes
    """int32, little-endian."""


class Flush(_Struct):
    """Asks a serving stage to say when all that it was told of until now is with the keeper. Answered by `Flushed`."""

    call: int
    stamp: Stamp


class Flushed(_Struct):
    """Nothing is on its way any more. What the keeper has, it says itself."""

    call: int


class ReplicationReport(_Struct):
    """How the replication of one instance's blocks by one stage goes. Counts are since the stage served it first."""

    address: str
    """Where to; empty for nowhere."""
    connected: bool
    block_bytes: int
    sealed_blocks: int
    """Blocks with sealed content here, now."""
    stored_blocks: int
    """Those of them that the other stage has acknowledged and not dropped since."""
    lag_blocks: int
    """Those of them that are to be sent, or sent and not acknowledged. Blocks that were refused for want of room are
    neither stored nor lagging."""
    lag_seconds: float
    """Since when the oldest of these has been waiting."""
    sent_blocks: int
    sent_bytes: int
    cancelled_blocks: int
    """Reused before they were sent."""
    refused_blocks: int
    """The other stage had no room, or dropped them later."""
    corrupt_blocks: int
    """Arrived with another checksum than they were sent with."""


class ReplicaHello(_Struct):
    """First message of a stage that wants its sealed blocks of ``instance`` kept; answered by `ReplicaWelcome`."""

    protocol: int
    instance: int
    stage: int
    stamp: Stamp
    layout: str
    """Whatever both sides' blocks must have in common for one's bytes to be the other's."""
    block_bytes: int


class ReplicaWelcome(_Struct):
    """What is kept already of this instance, and of use if the numbers are still valid."""

    refusal: str
    """Why nothing can be kept here; empty if it can."""
    held_blocks: bytes
    held_numbers: bytes


class Replicas(_Struct):
    """Sealed blocks to keep, with their content behind it in this order. Answered by `ReplicasKept`."""

    seals: list[Seal]
    checksums: list[int]
    """XXH3, 64 bits, of each block's content, seeded with its block and number."""
    void: list[int]
    """Blocks whose kept content, if any, is of no use any more. They come before ``seals``."""
    ended: list[int]
    """Owners that have ended."""
    body_bytes: int


class ReplicasKept(_Struct):
    """What became of one `Replicas`, and of earlier ones since."""

    stored: list[int]
    """Seal numbers."""
    refused: list[int]
    """No room, or the parent is not here."""
    corrupt: list[int]
    """The checksum did not fit."""
    dropped: list[int]
    """Stored earlier, and given up since for something more useful."""
    room: int
    """Blocks that could be stored now without dropping any."""


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


# --- weights --------------------------------------------------------------------------------------------------


class WeightsHello(_Struct):
    """First message of a stage that starts, to a twin whose weights it wants. Answered by `WeightsWelcome`."""

    protocol: int
    stage: int
    rank: int
    """Its tensor-parallel rank: it gets the weights of the twin's rank of the same number."""
    digest: str
    """Of all that decides names, layout and content of weights."""


class WeightsWelcome(_Struct):
    """All `Weights` follow, without being asked for, unless there is a refusal."""

    refusal: str
    """Why none are given; empty if they are."""
    tensors: list[TensorHeader]
    """In the order in which their memory follows, cut into runs (`weights.runs`)."""


class Weights(_Struct):
    """The next run of a tensor's memory, which follows."""

    checksum: int
    """XXH3, 64 bits, seeded with the place of the run."""
    body_bytes: int


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
    | StageLeaving
    | Step
    | StepResult
    | StepFailed
    | Activation
    | Sealed
    | ReplicateTo
    | Forget
    | Flush
    | Flushed
    | ReplicaHello
    | ReplicaWelcome
    | Replicas
    | ReplicasKept
    | WeightsHello
    | WeightsWelcome
    | Weights
)
