"""Objects as the operator leaves them, for the health check of Argo CD: what it decides about worlds of all kinds.

    python -m tests.operator.recorded

writes them anew. A test fails when they differ from what the operator says today.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from resilientllm_api.crd import API_VERSION, KIND, NOTHING_OBSERVED, PAUSED_ANNOTATION, ResilientLLMStatus
from resilientllm_api.engine_state import EnginePhase
from resilientllm_operator.conditions import unreadable
from resilientllm_operator.world import Exit, World

from tests.operator.builders import (
    NOW,
    borrowed,
    engine,
    engine_state,
    healthy_world,
    new_world,
    obj,
    pod,
    settled,
    silent,
    stage,
    status_of,
    with_engine,
    with_pod,
    with_pods,
    with_spec,
    with_status,
    without_pod,
)

FOLDER = Path(__file__).parents[2] / "manifests" / "argocd" / "resilientllm.dev" / "ResilientLLM" / "testdata"
NO_NODE = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
BAD_FLAG = Exit(2, "resilientllm-stage: error: unrecognized arguments: --nonsense\n")


def starting() -> World:
    world = with_pods(new_world())
    return replace(world, pods=tuple(replace(each, ready=False) for each in world.pods))


def no_node_takes_it() -> World:
    return with_pod(starting(), stage(0, 0), unschedulable=NO_NODE)


def donor_stands_in() -> World:
    """While the lost stage's process starts again."""
    world = with_engine(healthy_world(), 0, borrowed(0, 1, donor=1))
    return with_pod(world, stage(0, 1), ready=False)


def nothing_can_replace_a_stage() -> World:
    """It is served, by a donor; a person must help all the same."""
    return with_pod(donor_stands_in(), stage(0, 1), unschedulable=NO_NODE)


def one_instance_waits() -> World:
    """No donor is left for one instance; the other serves."""
    state = engine_state(0, phase=EnginePhase.WAITING, serving=False, on_own_stages=False)
    lost = tuple(each.model_copy(update={"served_by": None}) if each.stage == 1 else each for each in state.stages)
    world = with_engine(healthy_world(), 0, state.model_copy(update={"stages": lost}))
    return without_pod(world, stage(0, 1))


def all_engines_lost() -> World:
    return silent(silent(healthy_world(), 0), 1)


def grown() -> World:
    """A third instance is asked for."""
    world = settled(with_spec(healthy_world(), instances=3))
    return replace(world, pods=(*world.pods, pod(world.object, stage(2, 0), ready=False)))


def grown_beyond_the_nodes() -> World:
    return with_pod(grown(), stage(2, 0), unschedulable=NO_NODE)


def rolling_out() -> World:
    return with_spec(healthy_world(), args=["--max-num-seqs=32"])


def roll_out_stopped() -> World:
    world = with_spec(healthy_world(), args=["--nonsense"])
    for slot in (stage(0, 0), stage(0, 1), engine(0)):
        world = with_pod(world, slot, spec_hash=pod(world.object, slot).spec_hash, ready=False, last_exit=BAD_FLAG)
    return silent(world, 0)


def paused() -> World:
    world = healthy_world()
    return replace(world, object=replace(world.object, paused=True))


def paused_roll_out() -> World:
    world = rolling_out()
    return replace(world, object=replace(world.object, paused=True))


def observing() -> World:
    """A pod is gone, and spec.recovery.mode keeps the operator from making another."""
    return without_pod(
        with_engine(healthy_world(recovery={"mode": "Observe"}), 0, borrowed(0, 1, donor=1)), stage(0, 1)
    )


def spec_unreadable() -> World:
    """A newer CRD admits what this operator cannot read."""
    world = healthy_world()
    status = unreadable(world.object.status, 2, "recovery.mode: Input should be 'Act' or 'Observe'", NOW)
    return with_status(replace(world, object=replace(world.object, generation=2)), status)


WORLDS: dict[str, Callable[[], World]] = {
    "starting": starting,
    "no-node-takes-it": no_node_takes_it,
    "healthy": healthy_world,
    "donor-stands-in": donor_stands_in,
    "nothing-can-replace-a-stage": nothing_can_replace_a_stage,
    "one-instance-waits": one_instance_waits,
    "all-engines-lost": all_engines_lost,
    "grown": grown,
    "grown-beyond-the-nodes": grown_beyond_the_nodes,
    "rolling-out": rolling_out,
    "roll-out-stopped": roll_out_stopped,
    "paused": paused,
    "paused-roll-out": paused_roll_out,
    "observing": observing,
}


def objects() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and manifest of each, as ``kubectl get --output=yaml`` has it."""
    yield "not-seen-yet", recorded(replace(new_world(), object=obj()), {"observedGeneration": NOTHING_OBSERVED})
    for name, world in WORLDS.items():
        yield name, as_decided(world())
    yield "spec-changed", recorded(with_spec(healthy_world(), instances=3), as_json(healthy_world().object.status))
    yield "spec-unreadable", recorded(spec_unreadable(), as_json(spec_unreadable().object.status))


def as_decided(world: World) -> dict[str, Any]:
    """The object, with the status that the operator would write."""
    return recorded(world, as_json(status_of(world, NOW + timedelta(seconds=5))))


def as_json(status: ResilientLLMStatus) -> dict[str, Any]:
    return status.model_dump(mode="json", by_alias=True, exclude_none=True)


def recorded(world: World, status: dict[str, Any]) -> dict[str, Any]:
    seen = world.object
    annotations = {"annotations": {PAUSED_ANNOTATION: "true"}} if seen.paused else {}
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {
            "name": seen.name,
            "namespace": seen.namespace,
            "uid": seen.uid,
            "generation": seen.generation,
            **annotations,
        },
        "spec": seen.spec.model_dump(mode="json", by_alias=True, exclude_none=True),
        "status": status,
    }


def text_of(manifest: dict[str, Any]) -> str:
    return yaml.safe_dump(manifest, sort_keys=False, width=120)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, manifest in objects():
        (FOLDER / f"{name}.yaml").write_text(text_of(manifest))


if __name__ == "__main__":
    main()
