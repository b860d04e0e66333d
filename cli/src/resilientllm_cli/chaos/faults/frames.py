"""Bytes that arrive changed, or not all of them. The relay is in the path to one stage (``relay.py``)."""

from __future__ import annotations

from functools import partial

from resilientllm_cli.chaos.relay import Spoil
from resilientllm_cli.chaos.scene import Kind, Scene

TRAFFIC_SECONDS = 2.0
HEARTBEATS = ("commands", False)


def spoil(scene: Scene, truncate: bool) -> None:
    relay = scene.world.relay
    if relay is None:
        raise RuntimeError("expected a world with a relay")
    ways = [("commands", True), HEARTBEATS, ("replicas", True)]
    if scene.victim.stage > 0:
        ways += [("link", True)] * 3  # where most bytes are
    chosen, place = scene.random.choice(ways), scene.random.random()
    scene.strike()
    try:
        evidence = relay.spoil(Spoil(*chosen, truncate, place), TRAFFIC_SECONDS)
    except TimeoutError:  # nobody has anything to copy just then; heartbeats always come
        evidence = relay.spoil(Spoil(*HEARTBEATS, truncate, place), TRAFFIC_SECONDS)
    scene.strike()
    scene.landed = evidence


KINDS = (
    Kind("frame-corrupt", partial(spoil, truncate=False), relayed=True),
    Kind("frame-truncated", partial(spoil, truncate=True), relayed=True),
)
