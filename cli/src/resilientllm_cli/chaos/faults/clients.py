"""Clients that behave as clients do, while a stage is lost."""

from __future__ import annotations

from functools import partial

from resilientllm_cli.chaos.faults.kills import kill
from resilientllm_cli.chaos.scene import Kind, Scene

NEW, BURST = 8, 200


def leave(scene: Scene) -> None:
    kill(scene)
    scene.landed["clients_gone"] = scene.load.leave(scene.victim.instance)


def come(scene: Scene, count: int) -> None:
    kill(scene)
    scene.load.more(scene.victim.instance, count)
    scene.landed["more_requests"] = count


KINDS = (
    Kind("clients-leave", leave),
    Kind("clients-come", partial(come, count=NEW)),
    Kind("clients-burst", partial(come, count=BURST)),
    Kind("clients-slow", kill, reads_slowly=True),
)
