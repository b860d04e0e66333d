"""Engines that fight for one instance, its stages, and a network that keeps every message and may deliver it any time.

So messages are held back, overtaken, repeated and lost, and a process that is stopped is one whose turn does not come.
What a stage makes of them is production's own step function. Beside the state there are *ghosts*, by which the rules
are judged and which no rule may see: whose hidden states these are, which engine numbered a seal.

The network is worse than TCP, and connections that ended are still obeyed. So more is possible here than there is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from resilientllm_worker.protocol import fencing as production
from resilientllm_worker.protocol.messages import Stamp


class Violation(AssertionError):
    """What must never happen did."""


class Setting(NamedTuple):
    """What is possible in a world: the smaller, the sooner all of it is explored."""

    places: tuple[tuple[int, ...], ...]
    """For every place of the pipeline the stages that can serve it."""
    epochs: tuple[int, ...]
    """How often each engine may stitch. Its term is its place here, from 1."""
    steps: int = 0
    """Of each stamp."""
    replicates: bool = False
    endings: bool = False
    """Connections end, though both their ends live."""
    crashes: int = 0
    """Of stages."""
    one_term: bool = False
    """What must not be: the engines have the same term."""

    def term(self, engine: int) -> int:
        return 1 if self.one_term else 1 + engine


class Connection(NamedTuple):
    """Of an engine with one incarnation of a stage."""

    engine: int
    stage: int
    boot: int


class Link(NamedTuple):
    """From one incarnation of a stage to the next stage, or to a keeper."""

    stage: int
    boot: int
    stamp: Stamp
    kind: str


# --- messages, to one incarnation of a stage, or over its connection ---------------------------------------------


@dataclass(frozen=True, slots=True)
class Fence:
    to: Connection
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class Stitch:
    to: Connection
    stamp: Stamp
    following: tuple[int, int] | None
    """The next stage, and its incarnation."""


@dataclass(frozen=True, slots=True)
class Step:
    to: Connection
    stamp: Stamp
    step: int


@dataclass(frozen=True, slots=True)
class Seal:
    to: Connection
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class ReplicateTo:
    to: Connection
    stamp: Stamp
    keeper: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Hello:
    """Of a link, or of a replica channel."""

    to: tuple[int, int]
    link: Link


@dataclass(frozen=True, slots=True)
class Activation:
    to: tuple[int, int]
    link: Link
    stamp: Stamp
    step: int
    engine: int
    """A ghost: whose step it is from."""


@dataclass(frozen=True, slots=True)
class Replica:
    to: tuple[int, int]
    link: Link
    numbered_by: int
    """A ghost: the engine."""


@dataclass(frozen=True, slots=True)
class Result:
    to: Connection
    stamp: Stamp
    step: int
    engine: int
    """A ghost: whose step it is from."""


Message = Fence | Stitch | Step | Seal | ReplicateTo | Hello | Activation | Replica | Result


@dataclass(frozen=True, slots=True)
class Stitched:
    """The answer, which does not travel."""

    to: Connection
    stamp: Stamp


class Engine(NamedTuple):
    epoch: int = 0
    pipeline: tuple[int, ...] = ()
    answered: frozenset[int] = frozenset()
    in_flight: frozenset[int] = frozenset()
    next_step: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """A step in the runner; a fence does not reach it."""

    step: Step
    outbound: tuple[Link, tuple[int, int]] | None


class Stage(NamedTuple):
    fencing: Any
    boot: int = 0
    outbound: tuple[Link, tuple[int, int]] | None = None
    stitching: frozenset[Stitch] = frozenset()
    """They are fenced, and wait for old writes or dial."""
    turn: Turn | None = None
    sealed: frozenset[int] = frozenset()
    """Ghosts: the engines that numbered what is sealed here. All of them number from 1."""
    course: tuple[Link, tuple[int, int]] | None = None
    """Where replicas go."""
    # Ghosts.
    obeyed: tuple[Stamp, int | None] = (production.NEVER, None)
    """The highest stamp, and whose it is."""
    open: frozenset[Connection | Link] = frozenset()
    """Of whom something was obeyed, and who was not told that they count no more."""
    began: int = -1
    in_runner: tuple[Stamp, bool] = (production.NEVER, True)
    """The topology whose requests the runner has, and whether it was told that they are void."""


Event = Message | Turn | Connection | Link | str
"""A message; the end of a stitch, a turn, a connection or a link; or what a stage does of itself."""


class World(NamedTuple):
    engines: tuple[Engine, ...]
    stages: tuple[Stage, ...]
    network: frozenset[Message] = frozenset()
    crashes: int = 0


def begin(setting: Setting, rules: Any = production) -> World:
    stages = 1 + max(stage for place in setting.places for stage in place)
    return World((Engine(),) * len(setting.epochs), (Stage(rules.Fencing()),) * stages)


class Play:
    """All that may happen next in a world of one setting, under ``rules``: production's, or a mutant of them."""

    def __init__(self, setting: Setting, rules: Any = production) -> None:
        self.setting = setting
        self.rules = rules
        self.facts: set[str] = set()
        """Of all that has happened: what the rules must not prevent."""
        self._pipelines = list(itertools.product(*setting.places))
        self._place = {stage: place for place, stages in enumerate(setting.places) for stage in stages}
        self._known: dict[tuple[int, Stage, Event], tuple[Stage, tuple[Message | Stitched, ...]]] = {}
        """What comes of an event does not depend on the rest of the world."""

    def moves(self, world: World) -> Iterator[tuple[object, World]]:
        """What may happen, and the world after it. Raises `Violation`."""
        for name, engine in enumerate(world.engines):
            if engine.epoch < self.setting.epochs[name]:
                for pipeline in self._pipelines:
                    yield (name, "stitches", pipeline), self._restitch(world, name, pipeline)
            answered = bool(engine.epoch) and engine.answered == frozenset(engine.pipeline)
            # Steps may overtake the stitch, but of two engines with one term only one has all answers.
            if engine.next_step < self.setting.steps and (answered or (engine.epoch and not self.setting.one_term)):
                yield (name, "submits"), self._submit(world, name)
            if answered and self.setting.replicates:
                yield (name, "seals"), self._seal(world, name)
        for message in world.network:
            if isinstance(message, Result):
                yield message, self._hear(world, message)
            elif world.stages[message.to[-2]].boot == message.to[-1]:
                yield message, self._meet(world, message.to[-2], message)
        for name, stage in enumerate(world.stages):
            for event in self._own_events(name, stage):
                yield (name, event), self._meet(world, name, event)
            if world.crashes < self.setting.crashes:
                fresh = Stage(self.rules.Fencing(), boot=stage.boot + 1)
                yield (name, "crashes"), _with_stage(world, name, fresh)._replace(crashes=world.crashes + 1)

    # --- engines -----------------------------------------------------------------------------------------------

    def _stamp(self, world: World, name: int) -> Stamp:
        return Stamp(self.setting.term(name), world.engines[name].epoch)

    def _restitch(self, world: World, name: int, pipeline: tuple[int, ...]) -> World:
        before = world.engines[name]
        world = _with_engine(world, name, Engine(before.epoch + 1, pipeline))
        stamp = self._stamp(world, name)
        sent: list[Message] = []
        for stage in {*before.pipeline, *pipeline}:
            sent.append(Fence(_to(world, name, stage), stamp))
        for place, stage in enumerate(pipeline):
            following = _incarnation(world, pipeline[place + 1]) if place + 1 < len(pipeline) else None
            sent.append(Stitch(_to(world, name, stage), stamp, following))
        return _with_messages(world, *sent)

    def _submit(self, world: World, name: int) -> World:
        engine, stamp = world.engines[name], self._stamp(world, name)
        number = engine.next_step
        engine = engine._replace(in_flight=engine.in_flight | {number}, next_step=number + 1)
        steps = [Step(_to(world, name, stage), stamp, number) for stage in engine.pipeline]
        return _with_messages(_with_engine(world, name, engine), *steps)

    def _seal(self, world: World, name: int) -> World:
        """All that was computed is sealed, and kept by some other stage of the same place."""
        engine, stamp = world.engines[name], self._stamp(world, name)
        sent: list[Message] = []
        for place, stage in enumerate(engine.pipeline):
            to = _to(world, name, stage)
            others = [keeper for keeper in self.setting.places[place] if keeper != stage]
            sent.append(Seal(to, stamp))
            sent.extend(ReplicateTo(to, stamp, _incarnation(world, keeper)) for keeper in others)
        return _with_messages(world, *sent)

    def _hear(self, world: World, result: Result) -> World:
        name = result.to.engine
        engine, stamp = world.engines[name], self._stamp(world, name)
        if not self.rules.is_awaited(stamp, engine.in_flight, result.stamp, result.step):
            return world
        if result.stamp != stamp or result.engine != name:
            raise Violation(f"engine {name} delivers at {stamp} what is of {result}")
        if result.step not in engine.in_flight:
            raise Violation(f"engine {name} delivers a token twice: {result}")
        self.facts.add(f"engine {name} delivers step {result.step} of {stamp} by {engine.pipeline}")
        return _with_engine(world, name, engine._replace(in_flight=engine.in_flight - {result.step}))

    # --- stages ------------------------------------------------------------------------------------------------

    def _own_events(self, name: int, stage: Stage) -> Iterator[Event]:
        yield from stage.stitching
        if stage.turn is not None:
            yield stage.turn
        elif stage.fencing.next_step(self._place[name] > 0) is not None:
            yield "takes a step"
        if self.setting.endings:
            for engine in range(len(self.setting.epochs)):
                yield Connection(engine, name, stage.boot)
            for link in stage.fencing.links:
                yield link.peer

    def _meet(self, world: World, name: int, event: Event) -> World:
        """``world`` itself if nothing comes of it."""
        stage = world.stages[name]
        if (known := self._known.get((name, stage, event))) is None:
            reaction = self._react(name, stage, event)
            self._check(name, reaction[0])
            known = self._known[name, stage, event] = reaction[0], tuple(reaction[1])
        after, sent = known
        if after != stage:
            world = _with_stage(world, name, after)
        for message in sent:
            if isinstance(message, Stitched):
                world = self._answer(world, message)
            elif message not in world.network:
                world = _with_messages(world, message)
        return world

    def _answer(self, world: World, answer: Stitched) -> World:
        """At once: what the engine does with it may come later, and an answer is found by the number of its call."""
        name = answer.to.engine
        engine = world.engines[name]
        if answer.stamp != self._stamp(world, name):
            return world
        return _with_engine(world, name, engine._replace(answered=engine.answered | {answer.to.stage}))

    def _react(self, name: int, stage: Stage, event: Event) -> tuple[Stage, list[Message | Stitched]]:
        """What the server makes of an event. A stitch is one twice: as it comes, and when it has dialled."""
        fencing, sent = stage.fencing, list[Message | Stitched]()
        match event:
            case Stitch() if event in stage.stitching:
                return self._end_stitch(name, stage, event)
            case Fence() | Stitch():
                fenced, verdict = fencing.fence(event.stamp, event.to)
                stage = self._after(stage, fenced, verdict, event.to, event.stamp)
                if verdict.voids:
                    inlet = None if fenced.inlet is None else fenced.inlet.stamp
                    self.facts.add(f"stage {name} at {fencing.stamp} obeys {event.stamp}, and keeps for {inlet}")
                elif not verdict.refusal:
                    self.facts.add(f"stage {name} hears again of {event.stamp}, and obeys")
                if isinstance(event, Stitch) and not verdict.refusal:
                    stage = stage._replace(stitching=stage.stitching | {event})
            case Step():
                stage = stage._replace(fencing=fencing.queue(event, event.to)[0])
            case Seal():
                if fencing.is_in_force(event.stamp, event.to):
                    stage = stage._replace(sealed=stage.sealed | {event.to.engine})
                    sent.extend(_replicas(stage))
            case ReplicateTo():
                if fencing.is_in_force(event.stamp, event.to):
                    link = Link(name, stage.boot, event.stamp, "replicas")
                    stage = stage._replace(course=(link, event.keeper))
                    sent.extend([Hello(event.keeper, link), *_replicas(stage)])
            case Hello(link=link) if link.kind == "replicas":
                after, verdict = fencing.keep(link.stamp, link)
                stage = self._after(stage, after, verdict, link)
                if not verdict.refusal:
                    self.facts.add(f"stage {name} at {fencing.stamp} keeps for {link.stamp}")
            case Hello(link=link):
                after, verdict = fencing.link(link.stamp, link)
                stage = self._after(stage, after, verdict, link)
                if not verdict.refusal:
                    self.facts.add(f"stage {name} at {fencing.stamp} takes a link for {link.stamp}")
            case Activation():
                after, _ = fencing.land(event.stamp, event.link, event.step, event.engine)
                if not set(fencing.landed) <= set(after.landed) or len(after.landed) > len(set(after.landed)):
                    raise Violation(f"stage {name} had {fencing.landed}, and has {after.landed} after {event}")
                stage = stage._replace(fencing=after)
            case Replica():
                if fencing.may_store(event.link.stamp, event.link):
                    self.facts.add(f"stage {name} stores for {event.link.stamp}")
                    stage = stage._replace(sealed=stage.sealed | {event.numbered_by})
            case "takes a step":
                stage = self._take_step(name, stage)
            case Turn(step=step, outbound=outbound):
                stage = stage._replace(turn=None)
                if outbound is None:
                    sent.append(Result(step.to, step.stamp, step.step, step.to.engine))
                else:
                    link, following = outbound
                    sent.append(Activation(following, link, step.stamp, step.step, step.to.engine))
            case Connection():
                stage = self._after(stage, *fencing.leave(event))
                stage = stage._replace(open=stage.open - {event})
                if event not in stage.open and stage.fencing.engine == event:
                    raise Violation(f"stage {name} still serves {event}, which has ended")
            case Link():
                stage = stage._replace(fencing=fencing.unlink(event), open=stage.open - {event})
        return stage, sent

    def _end_stitch(self, name: int, stage: Stage, stitch: Stitch) -> tuple[Stage, list[Message | Stitched]]:
        stage = stage._replace(stitching=stage.stitching - {stitch})
        stitched, sent = stage.fencing.stitched, list[Message | Stitched]()
        outbound = None
        if stitch.following is not None:
            link = Link(name, stage.boot, stitch.stamp, "link")
            outbound = link, stitch.following
            sent.append(Hello(stitch.following, link))
        fencing, verdict = stage.fencing.stitch(stitch.stamp, stitch.to)
        stage = self._after(stage, fencing, verdict)
        if not verdict.refusal:
            if not stitched:
                self.facts.add(f"stage {name} is stitched by {stitch.stamp} with seals of {sorted(stage.sealed)}")
            stage = stage._replace(outbound=outbound)
            sent.append(Stitched(stitch.to, stitch.stamp))
        return stage, sent

    def _take_step(self, name: int, stage: Stage) -> Stage:
        before, (fencing, step, engine) = stage.fencing, stage.fencing.take()
        used = [each for each in before.landed if each not in fencing.landed]
        if [(each.stamp, each.step, each.states) for each in used] != [(step.stamp, step.step, engine)][: len(used)]:
            raise Violation(f"stage {name} begins {step}, and uses up {used}")
        if not before.stitched:
            raise Violation(f"stage {name} begins {step} before it is stitched")
        if (step.stamp, step.to.engine) != stage.obeyed:
            raise Violation(f"stage {name} begins {step}, though it obeyed {stage.obeyed}")
        if step.step <= stage.began:
            raise Violation(f"stage {name} begins {step} after step {stage.began}")
        if self._place[name] > 0 and (engine != step.to.engine or not used):
            raise Violation(f"stage {name} begins {step} with hidden states of engine {engine}")
        ran, void = stage.in_runner
        if ran != step.stamp and not void:
            raise Violation(f"stage {name} begins {step} beside requests of {ran}")
        self.facts.add(f"stage {name} runs steps of {step.stamp} after those of {ran}")
        return stage._replace(
            fencing=fencing, turn=Turn(step, stage.outbound), began=step.step, in_runner=(step.stamp, False)
        )

    def _after(
        self,
        stage: Stage,
        fencing: Any,
        verdict: Any,
        opened: Connection | Link | None = None,
        stamp: Stamp | None = None,
    ) -> Stage:
        """After a verdict on what came over ``opened``."""
        if verdict.refusal:
            if fencing != stage.fencing:
                raise Violation(f"refused, and changed all the same: {verdict.refusal}")
            return stage
        if None in verdict.close:
            raise Violation("there is no connection to close")
        if isinstance(opened, Link) and any(each.stamp > opened.stamp for each in verdict.close):
            raise Violation(f"{opened} takes the place of a newer one of {verdict.close}")
        lost = (stage.fencing.links - fencing.links) | set(stage.fencing.landed).difference(fencing.landed)
        if any(each.stamp > stage.fencing.stamp and each.stamp >= fencing.stamp for each in lost):
            raise Violation(f"{lost} are lost, though what they are for is in force or yet to come")
        still_open = stage.open.difference(verdict.close)
        if opened is not None:
            still_open |= {opened}
        stage = stage._replace(fencing=fencing, open=still_open)
        if isinstance(opened, Connection) and stamp is not None:
            obeyed = stamp, opened.engine
            if stamp < stage.obeyed[0] or (stamp == stage.obeyed[0] and obeyed != stage.obeyed):
                raise Violation(f"{obeyed} is obeyed after {stage.obeyed}")
            if opened in verdict.close:
                raise Violation(f"{opened} is closed as soon as it is obeyed")
            stage = stage._replace(obeyed=obeyed)
        if verdict.voids:
            stage = stage._replace(outbound=None, began=-1, in_runner=(stage.in_runner[0], True))
        if verdict.recounts:
            stage = stage._replace(sealed=frozenset(), course=None)
        return stage

    def _check(self, name: int, stage: Stage) -> None:
        """Raises `Violation` unless a stage may be as it is."""
        fencing, (stamp, engine) = stage.fencing, stage.obeyed
        if fencing.stamp != stamp:
            raise Violation(f"stage {name} is at {fencing.stamp}, and has obeyed {stamp}")
        if fencing.engine is not None and fencing.engine.engine != engine:
            raise Violation(f"stage {name} obeys {fencing.engine}, and {stamp} is of engine {engine}")
        if any(step.stamp != stamp or step.to != fencing.engine for step in fencing.steps):
            raise Violation(f"stage {name} at {stamp} has steps that nobody waits for: {fencing.steps}")
        if any(late.step <= early.step for early, late in itertools.pairwise(fencing.steps)):
            raise Violation(f"stage {name} has steps twice, or in another order: {fencing.steps}")
        channels = [*fencing.links, *([fencing.inlet] if fencing.inlet is not None else [])]
        for each in (*channels, *fencing.landed):
            if each.stamp < stamp:
                raise Violation(f"stage {name} at {stamp} still has {each}")
        if any(link.peer.stamp != link.stamp for link in channels):
            raise Violation(f"stage {name} takes a channel for another than it is: {channels}")
        if fencing.stitched and fencing.inlet is not None:
            raise Violation(f"stage {name} serves the instance, and keeps blocks for it too")
        if fencing.stitched and fencing.engine is None:
            raise Violation(f"stage {name} serves for nobody")
        if stage.outbound is not None and not fencing.stitched:
            raise Violation(f"stage {name} has no place, and a link to the next one")
        if closed := [channel for channel in channels if channel.peer not in stage.open]:
            raise Violation(f"stage {name} goes on with {closed}, which are closed")
        if left := stage.open.difference([fencing.engine, *(channel.peer for channel in channels)]):
            raise Violation(f"stage {name} has forgotten, and not closed, {left}")
        if any(self.setting.term(each) != fencing.term for each in stage.sealed):
            raise Violation(f"stage {name} takes seals of {stage.sealed} for those of term {fencing.term}")
        if len(stage.sealed) > 1:
            raise Violation(f"stage {name} cannot tell the seals of engines {sorted(stage.sealed)} apart")
        if fencing.stitched and stage.sealed - {engine}:
            raise Violation(f"stage {name} serves engine {engine} with blocks that {stage.sealed} numbered")


# ---------------------------------------------------------------------------------------------------------------


def _replicas(stage: Stage) -> list[Replica]:
    """What goes to the keeper, now or later: all that is sealed, each under the number of its engine."""
    if stage.course is None:
        return []
    link, keeper = stage.course
    return [Replica(keeper, link, engine) for engine in stage.sealed]


def _incarnation(world: World, stage: int) -> tuple[int, int]:
    return stage, world.stages[stage].boot


def _to(world: World, engine: int, stage: int) -> Connection:
    return Connection(engine, *_incarnation(world, stage))


def _with_engine(world: World, name: int, engine: Engine) -> World:
    return world._replace(engines=(*world.engines[:name], engine, *world.engines[name + 1 :]))


def _with_stage(world: World, name: int, stage: Stage) -> World:
    return world._replace(stages=(*world.stages[:name], stage, *world.stages[name + 1 :]))


def _with_messages(world: World, *sent: Message) -> World:
    return world._replace(network=world.network.union(sent))
