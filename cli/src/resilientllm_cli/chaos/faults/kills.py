"""kill -9 of stages, by what they are at that moment."""

from __future__ import annotations

import time
from collections.abc import Set

from resilientllm_api.engine_state import EngineState
from resilientllm_api.plan import StageId

from resilientllm_cli.chaos.scene import Kind, Scene
from resilientllm_cli.chaos.shape import Shape
from resilientllm_cli.local.layout import stage_name

DONOR_SECONDS = 30.0
LONGEST_RECOVERY_SECONDS = 0.15
"""The second kill comes within so long of the first: detection and re-stitch take about that."""


def kill(scene: Scene) -> None:
    scene.strike()
    scene.landed = scene.world.processes.kill(scene.name)


def first(shape: Shape) -> list[StageId]:
    return [each for each in shape.stage_ids() if each.stage == 0]


def middle(shape: Shape) -> list[StageId]:
    return [each for each in shape.stage_ids() if 0 < each.stage < shape.stages - 1]


def last(shape: Shape) -> list[StageId]:
    return [each for each in shape.stage_ids() if each.stage == shape.stages - 1]


def served_by(state: EngineState, place: int) -> StageId | None:
    return state.stages[place].served_by if state.stages else None


def find_keeper(scene: Scene) -> None:
    """Before the streams begin: a busy engine may take longer to answer than they last."""
    place = scene.victim
    scene.other = scene.state(place.instance).replication[place.stage].kept_by
    if scene.other is None:
        raise RuntimeError(f"expected a keeper of {place}, found none")


def lose_own(scene: Scene) -> None:
    """The victim's own stage is gone for the whole run, and a donor stands in."""
    lost = scene.victim
    scene.undo.enter_context(scene.world.processes.held(stage_name(lost)))
    scene.world.processes.kill(stage_name(lost))

    def donor_serves(state: EngineState) -> bool:
        return state.serving and served_by(state, lost.stage) not in (None, lost)

    scene.wait_state(lost.instance, donor_serves, "a donor to stand in", DONOR_SECONDS)
    scene.other = served_by(scene.state(lost.instance), lost.stage)


def kill_donor(scene: Scene) -> None:
    _kill_other(scene, "donor", lost_already={scene.victim})


def kill_keeper(scene: Scene) -> None:
    _kill_other(scene, "keeper")


def _kill_other(scene: Scene, role: str, lost_already: Set[StageId] = frozenset()) -> None:
    if scene.other is None:
        raise RuntimeError(f"expected a {role} of {scene.victim}, found none")
    scene.donor_exists = scene.shape.have_donors(lost_already | {scene.other})
    scene.strike()
    evidence = scene.world.processes.kill(stage_name(scene.other))
    scene.landed = {role: str(scene.other), "of": str(scene.victim), **evidence}


def kill_two(scene: Scene) -> None:
    other = scene.another_place(scene.victim)
    scene.donor_exists = scene.shape.have_donors({scene.victim, other})
    scene.strike()
    one = scene.world.processes.kill(scene.name)
    two = scene.world.processes.kill(stage_name(other))
    scene.landed = {str(scene.victim): one, str(other): two}


def kill_second(scene: Scene) -> None:
    """Either the one that is about to stand in, or another one of the same pipeline."""
    victim = scene.victim
    others = [each for each in scene.shape.stage_ids() if each.instance == victim.instance and each != victim]
    donor = scene.random.random() < 0.5
    second = scene.other if scene.other is not None and donor else scene.random.choice(others)
    scene.donor_exists = scene.shape.have_donors({victim, second})
    scene.strike()
    began = time.monotonic()
    one = scene.world.processes.kill(scene.name)
    time.sleep(scene.random.uniform(0.0, LONGEST_RECOVERY_SECONDS))
    after = time.monotonic() - began
    two = scene.world.processes.kill(stage_name(second))
    scene.landed = {str(victim): one, str(second): two, "seconds_between": round(after, 4)}


KINDS = (
    Kind("kill-first", kill, places=first),
    Kind("kill-middle", kill, places=middle),
    Kind("kill-last", kill, places=last),
    Kind("kill-donor", kill_donor, prepare=lose_own),
    Kind("kill-keeper", kill_keeper, prepare=find_keeper),
    Kind("kill-two", kill_two),
    Kind("kill-second", kill_second, prepare=find_keeper),
)
