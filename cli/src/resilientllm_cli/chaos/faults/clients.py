"""Clients that behave as clients do, while a stage is lost."""

from __future__ import annotations

from resilientllm_cli.chaos.faults.kills import kill
from resilientllm_cli.chaos.scene import Kind, Scene

NEW, BURST = 8, 200


def leave(scene: Scene) -> None:
    kill(scene)
    scene.landed["clients_gone"] = scene.load.leave(scene.victim.instance)


def come(scene: Scene) -> None:
    kill(scene)
    scene.load.more(scene.victim.instance, NEW)
    scene.landed["more_requests"] = NEW


def burst(scene: Scene) -> None:
    kill(scene)
    scene.load.crowd(scene.victim.instance, BURST)
    scene.landed["more_requests"] = BURST


KINDS = (
    Kind("clients-leave", leave),
    Kind("clients-come", come),
    Kind("clients-burst", burst),
    Kind("clients-slow", kill, reads_slowly=True),
)
