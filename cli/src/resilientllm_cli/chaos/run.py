"""One run: load, the fault at a moment of chance, every stream compared, the world whole again, nothing leaked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Any

from resilientllm_api.engine_state import Recovery, RecoveryKind

from resilientllm_cli.chaos import leaks
from resilientllm_cli.chaos.line import Line
from resilientllm_cli.chaos.load import TOKENS, Load, Phase, Sent, Undisturbed
from resilientllm_cli.chaos.scene import Kind, Scene
from resilientllm_cli.chaos.world import World
from resilientllm_cli.comparison import Tokens, compare, stall_seconds
from resilientllm_cli.streams import SEND_AGAIN

WHOLE_SECONDS = 90.0
LATEST = 0.6
"""The fault comes before this fraction of a stream's tokens, so that enough of it is left."""
EARLY_SECONDS = 0.1
"""A suspicion that is older than the fault by more is a false one; some faults are timed just after they happened."""
FAIR = 16
"""Requests may be overtaken by so many later ones: a batch. Those of one batch get their tokens in any order."""


@dataclass(frozen=True)
class Moment:
    """When the fault comes, by chance."""

    phase: Phase
    tokens: int
    """When the victim's instance has given so many to one of its clients."""
    delay_seconds: float
    """In prefill: so long after the requests were sent, if it is not that far by then."""


@dataclass(frozen=True)
class Outcome:
    line: Line
    timeline: dict[str, Any]
    """Tokens of each stream over time, for a picture."""
    whole: bool
    """The world can be used again."""


def choose_moment(random: Random, undisturbed: Mapping[Phase, Undisturbed], instance: int) -> Moment:
    phase = random.choice(list(Phase))
    tokens = random.randrange(1, int(TOKENS[phase] * LATEST))
    slowest = max(undisturbed[phase].first_token_seconds[instance])
    return Moment(phase, tokens, random.uniform(0.0, slowest))


def run(world: World, kind: Kind, seed: int, undisturbed: Mapping[Phase, Undisturbed]) -> Outcome:
    """Never raises for what the fault did: that is in the line."""
    random = Random(f"{kind.name} {world.shape} {seed}")
    places = [world.relayed] if kind.relayed and world.relayed is not None else kind.places(world.shape)
    scene = Scene(world, random, random.choice(places))
    moment = choose_moment(random, undisturbed, scene.victim.instance)
    world.wait_whole(WHOLE_SECONDS)
    before = leaks.look(world)
    problems: list[str] = []
    totals: dict[int, int] = {}
    with scene.undo:
        try:
            kind.prepare(scene)
            totals = {i: scene.state(i).recoveries_total for i in range(world.shape.instances)}
            asyncio.run(under_load(scene, kind, moment, f"{kind.name} {seed} {time.monotonic_ns()}"))
        except (OSError, RuntimeError, TimeoutError) as error:
            problems.append(f"not injected as meant: {error}")
    ended = time.monotonic()
    whole_after, leaked, held = None, {}, {}
    try:
        whole_after = round(world.wait_whole(WHOLE_SECONDS), 3)
        found = leaks.settled(before, lambda: leaks.look(world))
        leaked = asdict(found)
        problems += found.problems()
        held = leaks.held(world)
    except TimeoutError as error:
        problems.append(str(error))
    recoveries = _recoveries(world, totals)
    line = judge(scene, kind, seed, moment, scene.load.sent, undisturbed[moment.phase], recoveries, ended, problems)
    line = replace(line, whole_after_seconds=whole_after, leaks=leaked, world=world.name, held=held)
    return Outcome(line, _timeline(scene, scene.load.sent, recoveries), whole_after is not None)


async def under_load(scene: Scene, kind: Kind, moment: Moment, salt: str) -> None:
    reached = asyncio.Event()

    def on_token(sent: Sent) -> None:
        if sent.instance == scene.victim.instance and len(sent.stream.tokens) >= moment.tokens:
            reached.set()

    scene.load = load = Load(on_token, kind.reads_slowly)
    urls = {instance: scene.world.url(instance) for instance in range(scene.shape.instances)}
    streaming = asyncio.create_task(load.run(urls, moment.phase, salt))
    await _first_of(streaming, load.begun, None)
    # What a prefill took without a fault was measured on a machine that may have been slower then.
    await _first_of(streaming, reached, moment.delay_seconds if moment.phase is Phase.PREFILL else None)
    try:
        # In a thread: the streams must go on being read.
        await asyncio.to_thread(kind.inject, scene)
    finally:
        await streaming


async def _first_of(streaming: asyncio.Task[None], event: asyncio.Event, timeout_seconds: float | None) -> None:
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait({streaming, waiting}, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


def judge(
    scene: Scene,
    kind: Kind,
    seed: int,
    moment: Moment,
    sent: Sequence[Sent],
    undisturbed: Undisturbed,
    recoveries: Mapping[int, Sequence[Recovery]],
    ended_seconds: float,
    problems: Sequence[str] = (),
) -> Line:
    found = list(problems)
    tokens = Tokens()
    explicit = otherwise = 0
    for each in sent:
        expected, got = undisturbed.tokens[each.instance][each.stream.index][: each.asked], each.stream.tokens
        if each.left:
            tokens += compare(expected[: len(got)], got)
            continue
        if each.stream.error and SEND_AGAIN in each.stream.error:
            explicit += 1
            tokens += compare(expected[: len(got)], got)
            continue
        if each.stream.error:
            otherwise += 1
            found.append(f"stream {each.stream.index} of engine {each.instance}: {each.stream.error}")
        tokens += compare(expected, got)
    at = scene.at_seconds
    # Who came later waits for a place in the batch as well.
    met = [each for each in sent if at is not None and each.sent_seconds <= at and not (each.left or _over(each, at))]
    stalls = [round(_stall(each, undisturbed, at, ended_seconds), 4) for each in met if at is not None]
    overtaken = _overtaken(sent, at) if at is not None else 0
    lost = [each for of in recoveries.values() for each in of if each.kind is RecoveryKind.BORROW]
    early = [each for each in lost if each.detected_at.timestamp() < scene.at_wall - EARLY_SECONDS]
    noticed = min((each for each in lost if each not in early), key=lambda each: each.detected_at, default=None)
    if not scene.landed:
        found.append("the fault did not land")
    if not met:
        found.append("no stream was met")
    found += [
        f"{name}: {count}"
        for name, count in (("lost", tokens.lost), ("duplicated", tokens.duplicated), ("changed", tokens.changed))
        if count
    ]
    if overtaken > FAIR:
        found.append(f"a request was overtaken by {overtaken} that came later")
    if explicit and scene.donor_exists:
        found.append(f"{explicit} requests failed though there was a donor")
    if early:
        found.append(f"suspected before the fault: {early[0].reason}")
    if lost and not kind.loses:
        found.append(f"suspected without reason: {lost[0].reason}")
    return Line(
        fault=kind.name,
        shape=str(scene.shape),
        seed=seed,
        landed=scene.landed,
        phase=moment.phase,
        victim=str(scene.victim),
        prompts_without_token=sum(
            at is not None and not (each.stream.arrivals_seconds and each.stream.arrivals_seconds[0] <= at)
            for each in sent
        ),
        streams_met=len(met),
        lost=tokens.lost,
        duplicated=tokens.duplicated,
        changed=tokens.changed,
        failed_explicitly=explicit,
        failed_otherwise=otherwise,
        overtaken=overtaken,
        donor_existed=scene.donor_exists,
        **_times(noticed, scene.at_wall),
        stall_seconds=max(stalls, default=None),
        stalls_seconds=tuple(stalls),
        recoveries=tuple(
            {
                "instance": instance,
                "kind": each.kind,
                "reason": each.reason,
                "places": each.stages,
                "after_seconds": round(each.detected_at.timestamp() - scene.at_wall, 4),
                "phases_ms": each.phases_ms,
            }
            for instance, of in recoveries.items()
            for each in of
        ),
        problems=tuple(found),
    )


def _times(recovery: Recovery | None, at_wall: float) -> dict[str, Any]:
    if recovery is None:
        return {}
    detection, phases = recovery.detected_at.timestamp() - at_wall, recovery.phases_ms
    until_fence = sum(phases.get(phase, 0.0) for phase in ("wait", "fence")) / 1000
    return {
        "detection_seconds": round(detection, 4),
        "fence_seconds": round(detection + until_fence, 4),
        "first_token_seconds": round(detection + phases.get("total", 0.0) / 1000, 4),
    }


def _over(sent: Sent, at_seconds: float) -> bool:
    return sent.stream.complete and sent.stream.arrivals_seconds[-1] <= at_seconds


def _stall(sent: Sent, undisturbed: Undisturbed, at_seconds: float, ended_seconds: float) -> float:
    """What the fault added to the longest wait: between tokens, or for the first one. One that never came to its end
    has waited for as long as it was watched."""
    arrivals = sent.stream.arrivals_seconds
    if not sent.stream.complete:
        arrivals = [*arrivals, ended_seconds]
    first = arrivals[0] - sent.sent_seconds - undisturbed.first_token_seconds[sent.instance][sent.stream.index]
    between = stall_seconds(arrivals, at_seconds) if len(arrivals) > 1 else 0.0
    return max(between, first if arrivals[0] > at_seconds else 0.0, 0.0)


def _overtaken(sent: Sequence[Sent], at_seconds: float) -> int:
    def first(each: Sent) -> float:
        return each.stream.arrivals_seconds[0] if each.stream.arrivals_seconds else float("inf")

    waiting = [each for each in sent if each.sent_seconds <= at_seconds < first(each) and not each.left]
    return max(
        (
            sum(
                later.instance == each.instance and later.sent_seconds > at_seconds and first(later) < first(each)
                for later in sent
            )
            for each in waiting
        ),
        default=0,
    )


def _recoveries(world: World, totals: Mapping[int, int]) -> dict[int, Sequence[Recovery]]:
    """Those that came since; an engine remembers ten."""
    found: dict[int, Sequence[Recovery]] = {}
    for instance, total in totals.items():
        state = world.engine_state(instance)
        if state is not None and state.recoveries_total > total:
            found[instance] = state.recoveries[-min(state.recoveries_total - total, len(state.recoveries)) :]
    return found


def _timeline(scene: Scene, sent: Sequence[Sent], recoveries: Mapping[int, Sequence[Recovery]]) -> dict[str, Any]:
    at = scene.at_seconds if scene.at_seconds is not None else time.monotonic()
    return {
        "faults": [0.0],
        "streams": [
            {
                "of": f"instance {each.instance}",
                "index": each.stream.index,
                "asked": len(each.stream.tokens),
                "arrivals": [round(arrival - at, 4) for arrival in each.stream.arrivals_seconds],
            }
            for each in sent
        ],
        "recoveries": [
            {
                "instance": instance,
                "kind": each.kind,
                "reason": each.reason,
                "places": each.stages,
                "detected": round(each.detected_at.timestamp() - scene.at_wall, 4),
                "phases_ms": each.phases_ms,
            }
            for instance, of in recoveries.items()
            for each in of
        ],
    }
