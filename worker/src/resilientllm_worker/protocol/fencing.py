"""What a stage obeys: the rules by which an older topology, or an engine that was replaced, changes nothing any more.

One instance at one stage, as plain data: an event gives the next state, and what is to be done about connections. The
network may hold back, reorder, repeat or lose whole messages, processes may stop and go on at any time, and two engines
may believe that the instance is theirs. ``tests/worker/protocol`` explores what then can happen, with these functions.

Assumed, and not checked here: no two engines of an instance ever have one term (`next_term`), and what comes over a
connection is of the peer that this connection was made with.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Generic, NamedTuple, Protocol, TypeVar

from resilientllm_worker.protocol.messages import Stamp

NEVER = Stamp(0, 0)


class Command(Protocol):
    """A step, as far as fencing goes."""

    @property
    def stamp(self) -> Stamp: ...

    @property
    def step(self) -> int: ...


Peer = TypeVar("Peer")
"""A connection, compared by identity."""
Work = TypeVar("Work", bound=Command)
States = TypeVar("States")
"""Hidden states of one step."""


class Channel(NamedTuple, Generic[Peer]):
    """A link, or a replica channel, and the stamp that it was made for."""

    stamp: Stamp
    peer: Peer


class Landed(NamedTuple, Generic[States]):
    stamp: Stamp
    step: int
    states: States


class Verdict(NamedTuple, Generic[Peer]):
    """What became of an event."""

    refusal: str = ""
    """Why it changed nothing; empty if it was obeyed."""
    close: tuple[Peer, ...] = ()
    """What these say counts no more, and nobody else would tell them."""
    voids: bool = False
    """What the instance has in the runner, and the link onward, are of an older topology now."""
    recounts: bool = False
    """Seals are numbered by a new engine from now on: those at hand must be cleared before anything else happens."""


class Fencing(NamedTuple, Generic[Peer, Work, States]):
    """The state. Every method that is an event returns the state after it."""

    stamp: Stamp = NEVER
    """The highest that an engine brought. Everything older is void."""
    term: int = 0
    """The highest that was seen of any peer: the seals here are numbered by that engine."""
    engine: Peer | None = None
    """Who brought the stamp, and alone is obeyed."""
    stitched: bool = False
    """This stage is in the pipeline of this stamp, so steps run here."""
    last_step: int = -1
    """Of this stamp; steps count up."""
    steps: tuple[Work, ...] = ()
    landed: tuple[Landed[States], ...] = ()
    """They wait for their step, which may be slower than they are. So may the fence that their stamp comes with."""
    links: frozenset[Channel[Peer]] = frozenset()
    inlet: Channel[Peer] | None = None
    """Whoever serves in our place, and has its sealed blocks kept here."""

    @property
    def newest(self) -> Stamp:
        """An engine that attaches must bring a higher term than this one's."""
        return max(self.stamp, Stamp(self.term, 0))

    # --- the engine's channel ----------------------------------------------------------------------------------

    def is_in_force(self, stamp: Stamp, engine: Peer) -> bool:
        """Whether a command is to be obeyed. The right stamp from another engine is a coincidence."""
        return stamp == self.stamp and engine == self.engine

    def fence(self, stamp: Stamp, engine: Peer) -> tuple[Fencing[Peer, Work, States], Verdict[Peer]]:
        """Obey ``stamp``. What this stage knows of a newer engine it may know from another stage's replicas alone."""
        if self.is_in_force(stamp, engine):
            return self, Verdict()
        if stamp <= self.stamp:
            return self, Verdict(f"obeys {self.stamp} of another engine, {stamp} is older")
        if stamp.term < self.term:
            return self, Verdict(f"keeps blocks for an engine of term {self.term}, {stamp} is older")
        fenced, closing = self._void(stamp)
        if self.inlet is not None and self.inlet.stamp < stamp:
            fenced = fenced._replace(inlet=None)
            closing = (*closing, self.inlet.peer)
        if self.engine is not None and self.engine != engine:
            closing = (*closing, self.engine)  # it would wait for ever for steps that are void now
        recounts = stamp.term > self.term
        return fenced._replace(stamp=stamp, term=stamp.term, engine=engine), Verdict("", closing, True, recounts)

    def stitch(self, stamp: Stamp, engine: Peer) -> tuple[Fencing[Peer, Work, States], Verdict[Peer]]:
        """Take the place, some time after the fence of the same stamp. Who serves keeps no replicas."""
        if not self.is_in_force(stamp, engine):
            return self, Verdict(f"was fenced by {self.stamp} meanwhile")
        if stamp.term < self.term:
            return self, Verdict(f"keeps blocks for an engine of term {self.term} meanwhile")
        closing = () if self.inlet is None else (self.inlet.peer,)
        return self._replace(stitched=True, inlet=None), Verdict("", closing)

    def queue(self, step: Work, engine: Peer) -> tuple[Fencing[Peer, Work, States], bool]:
        """Returns whether it is to run here, once `next_step` gives it."""
        if not self.is_in_force(step.stamp, engine) or step.step <= self.last_step:
            return self, False
        return self._replace(last_step=step.step, steps=(*self.steps, step)), True

    def leave(self, engine: Peer) -> tuple[Fencing[Peer, Work, States], Verdict[Peer]]:
        """The engine's connection ended. Its stamp stays: neither an older one nor the same may come back."""
        if engine != self.engine:
            return self, Verdict("obeys another engine")
        left, closing = self._void(Stamp(self.stamp.term, self.stamp.epoch + 1))
        return left._replace(engine=None), Verdict("", closing, True)

    # --- steps -------------------------------------------------------------------------------------------------

    def next_step(self, needs_states: bool) -> Work | None:
        """The step to run next, if all that it needs is here."""
        if not self.stitched or not self.steps:
            return None
        step = self.steps[0]
        return step if not needs_states or self._states_of(step) is not None else None

    def take(self) -> tuple[Fencing[Peer, Work, States], Work, States | None]:
        """The step that `next_step` gave, and the hidden states that came for it."""
        step, *later = self.steps
        landed = self._states_of(step)
        rest = tuple(each for each in self.landed if each is not landed)
        return self._replace(steps=tuple(later), landed=rest), step, None if landed is None else landed.states

    # --- links -------------------------------------------------------------------------------------------------

    def link(self, stamp: Stamp, peer: Peer) -> tuple[Fencing[Peer, Work, States], Verdict[Peer]]:
        """The previous stage has made a link, perhaps for a stitch of which this stage does not know yet."""
        if stamp < self.stamp:
            return self, Verdict(f"obeys {self.stamp}, a link for {stamp} is older")
        return self._replace(links=self.links | {Channel(stamp, peer)}), Verdict()

    def land(self, stamp: Stamp, peer: Peer, step: int, states: States) -> tuple[Fencing[Peer, Work, States], bool]:
        """Hidden states came over a link. False if it is none any more, or was made for another stamp."""
        if Channel(stamp, peer) not in self.links:
            return self, False
        others = tuple(each for each in self.landed if (each.stamp, each.step) != (stamp, step))
        return self._replace(landed=(*others, Landed(stamp, step, states))), True

    def unlink(self, peer: Peer) -> Fencing[Peer, Work, States]:
        return self._replace(links=frozenset(link for link in self.links if link.peer != peer))

    # --- replicas ----------------------------------------------------------------------------------------------

    def keep(self, stamp: Stamp, peer: Peer) -> tuple[Fencing[Peer, Work, States], Verdict[Peer]]:
        """Somebody wants its sealed blocks kept here."""
        if self.stitched:
            return self, Verdict("serves this instance itself")
        newest = self.newest if self.inlet is None else max(self.newest, self.inlet.stamp)
        if stamp < newest:
            return self, Verdict(f"knows a newer topology than {stamp}: {newest}")
        closing = () if self.inlet is None else (self.inlet.peer,)
        return (
            self._replace(inlet=Channel(stamp, peer), term=stamp.term),
            Verdict("", closing, recounts=stamp.term > self.term),
        )

    def may_store(self, stamp: Stamp, peer: Peer) -> bool:
        """Whether what came over a replica channel may still be kept."""
        return self.inlet == Channel(stamp, peer)

    # -----------------------------------------------------------------------------------------------------------

    def _void(self, stamp: Stamp) -> tuple[Fencing[Peer, Work, States], tuple[Peer, ...]]:
        """Nothing older than ``stamp`` is left; also the connections to close."""
        voided = self._replace(
            stitched=False,
            last_step=-1,
            steps=(),
            landed=tuple(each for each in self.landed if each.stamp >= stamp),
            links=frozenset(link for link in self.links if link.stamp >= stamp),
        )
        return voided, tuple(link.peer for link in self.links - voided.links)

    def _states_of(self, step: Command) -> Landed[States] | None:
        for each in self.landed:
            if (each.stamp, each.step) == (step.stamp, step.step):
                return each
        return None


# --- the engine's side ----------------------------------------------------------------------------------------


def next_term(clock_microseconds: int, seen: Iterable[int]) -> int:
    """Of an engine that attaches: above every term that a stage has seen, also when the clock went backwards.

    Microseconds, because of two engines that attach at once no stage tells the one of the other, and they must differ.
    """
    return max(clock_microseconds, *(term + 1 for term in seen), 1)


def is_awaited(in_force: Stamp, in_flight: Container[int], stamp: Stamp, step: int) -> bool:
    """Whether a result is delivered. Steps of every stamp are counted from 0, so a number alone names none."""
    return stamp == in_force and step in in_flight
