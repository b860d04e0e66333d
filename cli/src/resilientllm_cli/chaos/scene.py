"""A run as a fault sees it: the world, its chance, and where it puts down what it did."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from random import Random

from resilientllm_api.engine_state import EngineState
from resilientllm_api.plan import StageId

from resilientllm_cli.chaos.load import Load
from resilientllm_cli.chaos.shape import Shape
from resilientllm_cli.chaos.world import World
from resilientllm_cli.local.layout import stage_name


@dataclass
class Scene:
    world: World
    random: Random
    victim: StageId
    other: StageId | None = None
    """Whom the engine names, where the fault is about one: its donor, its keeper."""
    load: Load = field(default_factory=Load)
    landed: dict[str, object] = field(default_factory=dict)
    """The evidence that the fault happened; empty as long as there is none."""
    at_seconds: float | None = None
    """When it happened, on the monotonic clock."""
    at_wall: float = 0.0
    """The same on the wall clock, which engines date their recoveries by."""
    donor_exists: bool = True
    """False: nobody can stand in for what is lost, so requests may fail, explicitly."""
    undo: ExitStack = field(default_factory=ExitStack)
    """Left when the streams have ended."""

    @property
    def shape(self) -> Shape:
        return self.world.shape

    @property
    def name(self) -> str:
        """Of the victim's process."""
        return stage_name(self.victim)

    def strike(self, at_seconds: float | None = None) -> None:
        """Now is the fault, or was at that time."""
        now = time.monotonic()
        self.at_seconds = now if at_seconds is None else at_seconds
        self.at_wall = time.time() - (now - self.at_seconds)

    def state(self, instance: int) -> EngineState:
        state = self.world.engine_state(instance)
        if state is None:
            raise RuntimeError(f"engine {instance} does not answer")
        return state

    def wait_state(self, instance: int, holds: Callable[[EngineState], bool], what: str, seconds: float) -> None:
        """Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while (state := self.world.engine_state(instance)) is None or not holds(state):
            if time.monotonic() > deadline:
                raise TimeoutError(f"expected {what} within {seconds:g} s")
            time.sleep(0.05)

    def another_place(self, stage: StageId) -> StageId:
        """A stage of another instance, at any place."""
        others = [each for each in self.shape.stage_ids() if each.instance != stage.instance]
        return self.random.choice(others)


@dataclass(frozen=True)
class Kind:
    """A kind of fault. Its functions run in a thread, beside the streams, and may wait."""

    name: str
    inject: Callable[[Scene], None]
    """Does it, calls `Scene.strike` at that moment, and writes the evidence."""
    places: Callable[[Shape], list[StageId]] = lambda shape: list(shape.stage_ids())
    """The stages that it may happen to."""
    prepare: Callable[[Scene], None] = lambda scene: None
    """Before the streams begin."""
    loses: bool = True
    """False: nothing is lost, and a recovery would be a false alarm."""
    reads_slowly: bool = False
    """Of the clients."""
    relayed: bool = False
    """Needs a world with a relay; the victim is the stage behind it."""
