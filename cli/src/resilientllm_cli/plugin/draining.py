"""Who still depends on the stages of a node. Pure.

The operator moves work away from a node that is cordoned; what it says in the status of the objects is all that is
looked at here.
"""

from __future__ import annotations

from collections.abc import Iterable

from resilientllm_api.crd import ResilientLLM

from resilientllm_cli.status.of_object import name_of


def dependants(objects: Iterable[ResilientLLM], node: str) -> list[str]:
    """In words, each place that is served by, or kept on, a stage of the node."""
    found = []
    for obj in objects:
        instances = obj.status.instances if obj.status else ()
        there = {
            f"{instance.instance}.{stage.stage}"
            for instance in instances
            for stage in instance.stages
            if stage.node == node
        }
        for instance in instances:
            for place in instance.stages:
                name = f"{name_of(obj)}: place {instance.instance}.{place.stage}"
                if place.served_by in there:
                    found.append(f"{name} is served by stage {place.served_by}")
                if place.kept_by in there:
                    found.append(f"{name} has its copies on stage {place.kept_by}")
    return found


def engines(objects: Iterable[ResilientLLM], node: str) -> list[str]:
    """In words, each engine on the node."""
    return [
        f"{name_of(obj)}: engine {each.instance} ({each.engine})"
        for obj in objects
        for each in (obj.status.instances if obj.status else ())
        if each.node == node
    ]
