"""Paths that are cut or slow. The processes at both ends live."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

from resilientllm_api.plan import StageId

from resilientllm_cli.chaos.scene import Kind, Scene
from resilientllm_cli.chaos.shape import Shape
from resilientllm_cli.chaos.world import STAGE_PORT
from resilientllm_cli.local.layout import engine_name, stage_name

SHORTEST_SECONDS, LONGEST_SECONDS = 2.0, 6.0
"""How long a node is away."""
PROBE_SECONDS = 0.3
SLOWEST_KBITS, FASTEST_KBITS = 1000, 8000
"""Per second. A step of 512 tokens has 4 Mbit of hidden states."""


def with_next(shape: Shape) -> list[StageId]:
    return [each for each in shape.stage_ids() if each.stage < shape.stages - 1]


def next_of(stage: StageId) -> StageId:
    return StageId(instance=stage.instance, stage=stage.stage + 1)


def cut(scene: Scene, ways: Sequence[tuple[str, str]]) -> None:
    """Sender and receiver of each way, until the streams have ended."""
    with ExitStack() as stack:
        scene.strike()
        counts = {f"{a} > {b}": stack.enter_context(scene.world.network.dropped(a, b)) for a, b in ways}
        stack.callback(_count, scene, counts)
        scene.undo.push(stack.pop_all())


def _count(scene: Scene, counts: dict[str, Callable[[], int]]) -> None:
    """Before the rules are removed, so it is registered after them. A cut that nothing ran into proves nothing."""
    dropped = {way: count() for way, count in counts.items()}
    if any(dropped.values()):
        scene.landed = {"packets_dropped": dropped}


def cut_link(scene: Scene, forward: bool) -> None:
    sender, receiver = stage_name(scene.victim), stage_name(next_of(scene.victim))
    cut(scene, [(sender, receiver) if forward else (receiver, sender)])


def cut_commands(scene: Scene, to_stage: bool, to_engine: bool) -> None:
    engine = engine_name(scene.victim.instance)
    cut(scene, [(engine, scene.name)] * to_stage + [(scene.name, engine)] * to_engine)


def cut_node(scene: Scene) -> None:
    network, node = scene.world.network, scene.shape.node_of(scene.victim)
    host = stage_name(scene.victim)
    seconds = scene.random.uniform(SHORTEST_SECONDS, LONGEST_SECONDS)
    with network.unplugged(node):
        scene.strike()
        reached = _reached(network.address(host))
        if not reached:
            scene.landed = {"node": node, "seconds": round(seconds, 2), "reached": reached}
        time.sleep(seconds)


def _reached(address: str) -> bool:
    try:
        socket.create_connection((address, STAGE_PORT), PROBE_SECONDS).close()
    except OSError:
        return False
    return True


def slow_link(scene: Scene) -> None:
    rate = scene.random.randrange(SLOWEST_KBITS, FASTEST_KBITS)
    sender, receiver = stage_name(scene.victim), stage_name(next_of(scene.victim))
    with ExitStack() as stack:
        scene.strike()
        waited = stack.enter_context(scene.world.network.shaped(sender, receiver, rate))

        def count() -> None:
            if packets := waited():
                scene.landed = {"way": f"{sender} > {receiver}", "kbit_per_second": rate, "packets_held_up": packets}

        stack.callback(count)
        scene.undo.push(stack.pop_all())


KINDS = (
    Kind("link-cut-forward", partial(cut_link, forward=True), places=with_next),
    Kind("link-cut-backward", partial(cut_link, forward=False), places=with_next),
    Kind("commands-cut", partial(cut_commands, to_stage=True, to_engine=False)),
    Kind("answers-cut", partial(cut_commands, to_stage=False, to_engine=True)),
    Kind("engine-stage-cut", partial(cut_commands, to_stage=True, to_engine=True)),
    Kind("node-cut", cut_node),
    Kind("link-slow", slow_link, places=with_next, loses=False),
)
