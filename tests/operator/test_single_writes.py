"""An operator that dies after every single thing that it does gets there all the same: in the simulated cluster.

Nothing is left of a life but what it wrote. So no write may be taken back by an operator that begins with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from resilientllm_operator.actions import Announce, CreatePod, VerifyEngine
from resilientllm_operator.decide import decide
from resilientllm_operator.names import slots

from tests.operator.builders import NOW, obj, spec
from tests.operator.simulation import Simulation

MOST_LIVES = 200
LOOKS = 6
"""Rounds of a life that finds nothing to write: it hears engines, and has them prove themselves, in fewer."""


def live(sim: Simulation, events: list[Announce]) -> bool:
    """One life; whether it wrote anything. ``events``: all that were told, to which it adds."""
    sim.heard.clear()
    remembered = {each.verified for each in sim.object.status.instances}
    for engine in sim.engines.values():
        engine.verified = engine.verified if engine.verified in remembered else None
    for _ in range(LOOKS):
        for action in decide(sim.world(), sim.now):
            exists = action in events or (isinstance(action, CreatePod) and action.name in sim.pods)
            if isinstance(action, Announce) and not exists:
                events.append(action)
            sim.perform(action)
            if not isinstance(action, VerifyEngine) and not exists:
                return True
        sim.pass_time(0.5)
    return False


def as_specified(sim: Simulation) -> bool:
    conditions = {each.type: str(each.status) for each in sim.object.status.conditions}
    wanted = {"Ready": "True", "Degraded": "False", "Progressing": "False"}
    # On a node without power, pods hang.
    pods = sorted(pod.view.slot for pod in sim.pods.values() if not pod.view.leaving)
    return (
        all(conditions.get(kind) == value for kind, value in wanted.items())
        and pods == sorted(slots(sim.object.spec.instances, sim.object.spec.stages))
        and all(each.observed_generation == sim.object.generation for each in sim.object.status.conditions)
    )


def settle(sim: Simulation, events: list[Announce]) -> None:
    for _ in range(MOST_LIVES):
        wrote = live(sim, events)
        if not wrote and as_specified(sim):
            return
        sim.pass_time(1.0)
    raise AssertionError(f"not as specified after {MOST_LIVES} lives: {sim.object.status.model_dump_json(indent=1)}")


def edit(**changes: Any) -> Callable[[Simulation], None]:
    def change(sim: Simulation) -> None:
        known = sim.object
        sim.object = replace(known, spec=spec(**changes), generation=known.generation + 1)

    return change


def lose_a_node(sim: Simulation) -> None:
    sim.kill_node(sim.used_nodes()[0])
    sim.pass_time(60)


def lose_an_engine_and_change(sim: Simulation) -> None:
    """So that it comes back while another instance waits to give way."""
    name = next(name for name in sim.pods if name.startswith("tiny-0-engine"))
    sim.kill(name)
    edit(args=["--max-model-len=64"])(sim)


@pytest.mark.parametrize(
    "happens",
    [
        pytest.param(edit(args=["--max-model-len=64"]), id="a changed spec"),
        pytest.param(edit(instances=3), id="more instances"),
        pytest.param(edit(instances=1), id="fewer instances"),
        pytest.param(edit(instances=3, args=["--max-model-len=64"]), id="more instances of a changed spec"),
        pytest.param(lose_a_node, id="a lost node"),
        pytest.param(lose_an_engine_and_change, id="a lost engine and a changed spec"),
    ],
)
def test_it_gets_there(happens: Callable[[Simulation], None]) -> None:
    sim = Simulation(obj(spec=spec(instances=2)), 8, NOW)
    events: list[Announce] = []
    settle(sim, events)
    happens(sim)
    settle(sim, events)
