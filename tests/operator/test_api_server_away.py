"""Without the API server nothing is done, and when it is back nothing is done from old views.

It is away for the operator alone: people and kubelets go on meanwhile, so that every old view is wrong.
"""

from __future__ import annotations

import asyncio

import pytest
from resilientllm_operator.controller import WATCHED
from resilientllm_operator.kube import RESOURCES

from tests.operator.story import Simulation, Tell, create

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(900)]

AWAY_SECONDS = 12.0
"""Rounds, relists and attempts to write would all have come in this time."""


async def delete_by_hand(it: Simulation, *slots: str) -> list[str]:
    """A person deletes pods; returns when they are gone."""
    names = [str((await it.pod_of(slot))["metadata"]["name"]) for slot in slots]
    for name in names:
        await it.api.delete(f"api/v1/namespaces/{it.namespace}/pods/{name}")

    async def gone() -> bool:
        return not {pod["metadata"]["name"] for pod in await it.pods()} & set(names)

    await it.until("the pods to be gone", gone)
    return names


def test_nothing_is_done_meanwhile_and_nothing_twice_afterwards(tell: Tell) -> None:
    async def story(it: Simulation) -> None:
        await create(it)
        it.gate.close()
        writes = len(it.gate.writes)
        await delete_by_hand(it, "0-s1", "1-engine")
        await asyncio.sleep(AWAY_SECONDS)
        assert it.gate.writes[writes:] == [], "not even a plan is told to an engine"
        assert it.begun == 1, "it waits, and does not end"

        lists = len(it.gate.lists)
        it.gate.open()
        await it.until("an object that is as specified", it.as_specified)
        listed = it.gate.lists[lists : it.gate.lists_before[writes]]
        assert {RESOURCES[kind][1] for kind in WATCHED} <= set(listed), "all is listed anew before the first write"
        assert it.made(writes) == {"0-s1": 1, "1-engine": 1}
        assert it.engines.violations == []

    tell(story, "away")


def test_a_watch_that_has_died_without_a_word_is_noticed(tell: Tell) -> None:
    async def story(it: Simulation) -> None:
        await create(it)
        writes = len(it.gate.writes)
        it.gate.forget()
        await delete_by_hand(it, "1-s0")
        await it.until("an object that is as specified", it.as_specified)
        assert it.made(writes) == {"1-s0": 1}
        assert it.begun == 1

    tell(story, "silent")


def test_the_other_replica_takes_over_when_the_holder_is_killed(tell: Tell) -> None:
    async def story(it: Simulation) -> None:
        it.options = ()
        await create(it)
        writes = len(it.gate.writes)
        await delete_by_hand(it, "1-s0")
        await it.until("an object that is as specified", it.as_specified)
        it.lives.kill()  # Another one begins, and finds the lease held by the dead.
        await delete_by_hand(it, "0-s0")
        await it.until("an object that is as specified", it.as_specified)
        assert it.begun == 2
        assert it.made(writes) == {"1-s0": 1, "0-s0": 1}

    tell(story, "lease")
