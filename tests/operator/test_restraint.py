"""What holds the operator back, and what it shows of failures, as a person finds it on a real API server.

Engines and kubelets are simulated. Whatever is said of nodes is taken back, because all stories share them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest

from e2e.simulation.api import Json
from tests.operator.story import NAME, Simulation, Tell, create

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(600)]

FAULT = "Ours"
LAST_WORDS = "Traceback (most recent call last):\nRuntimeError: CUDA error: an illegal memory access\n"


async def node_of(it: Simulation, slot: str) -> str | None:
    """Of the newest pod of a slot; None as long as that has none."""
    found: str | None = (await it.pod_of(slot))["spec"].get("nodeName")
    return found


@asynccontextmanager
async def cordoned(it: Simulation, node: str | None) -> AsyncIterator[None]:
    await it.api.patch(f"api/v1/nodes/{node}", {"spec": {"unschedulable": True}})
    try:
        yield
    finally:
        await it.api.patch(f"api/v1/nodes/{node}", {"spec": {"unschedulable": None}})


@asynccontextmanager
async def faulty(it: Simulation, nodes: Sequence[str | None]) -> AsyncIterator[None]:
    """They have a condition of which nothing follows yet."""
    condition = {"type": FAULT, "status": "True", "reason": "Test", "lastTransitionTime": _time()}

    async def say(node: str | None, *said: Json) -> None:
        conditions = (await it.api.get(f"api/v1/nodes/{node}"))["status"]["conditions"]
        others = [each for each in conditions if each["type"] != FAULT]
        await it.api.patch(f"api/v1/nodes/{node}/status", {"status": {"conditions": [*others, *said]}})

    try:
        for node in nodes:
            await say(node, condition)
        yield
    finally:
        for node in nodes:
            await say(node)


async def annotate(it: Simulation, name: str, value: str | None) -> None:
    await it.api.patch(it.path, {"metadata": {"annotations": {f"resilientllm.dev/{name}": value}}})


async def says(it: Simulation, kind: str, reason: str) -> str | None:
    """The message of a condition, once it has this reason."""
    found = {each.type: each for each in (await it.status()).conditions}
    return found[kind].message if kind in found and found[kind].reason == reason else None


async def a_whole_round(it: Simulation) -> None:
    """The operator has looked at everything once more, and has done what followed from it."""
    for minutes in (58, 59):
        change = {"spec": {"recovery": {"repeatOffender": {"window": f"{minutes}m"}}}}
        generation = (await it.api.patch(it.path, change))["metadata"]["generation"]

        async def seen(generation: int = generation) -> bool:
            return (await it.status()).observed_generation == generation

        await it.until("the change of the spec to be seen", seen)


def touched(it: Simulation, since: int) -> list[str]:
    """Writes to pods, and plans."""
    return [write for write in it.gate.writes[since:] if " pods" in write or "plan" in write]


async def moves(it: Simulation, slot: str, node: str | None) -> None:
    async def moved() -> bool:
        return await node_of(it, slot) not in (None, node) and await it.as_specified()

    await it.until(f"{slot} on another node than {node}", moved)


def test_observe_tells_and_touches_nothing(tell: Tell) -> None:
    async def story(it: Simulation) -> None:
        await create(it)
        await it.api.patch(it.path, {"spec": {"recovery": {"mode": "Observe"}}})
        await it.until("an object that is as specified", it.as_specified)
        node, writes = await node_of(it, "0-s1"), len(it.gate.writes)
        async with cordoned(it, node):

            async def would_move() -> bool:
                told = (await it.status()).would_do
                return any(f"make pod {NAME}-0-s1-" in each and "is cordoned" in each for each in told)

            await it.until("what it would do", would_move)
            await a_whole_round(it)
            assert touched(it, writes) == []
            for kind in ("Progressing", "Stalled"):
                assert await says(it, kind, "ObserveOnly"), kind
            assert [note for reason, note in await it.events() if reason == "WouldAct"]
            await it.api.patch(it.path, {"spec": {"recovery": {"mode": "Act"}}})
            await moves(it, "0-s1", node)
        assert (await it.status()).would_do == ()

    tell(story, "observe")


def test_a_pause_keeps_what_works_and_replaces_what_is_lost(tell: Tell) -> None:
    async def story(it: Simulation) -> None:
        await create(it)
        await annotate(it, "paused", "true")

        async def paused() -> object:
            return await says(it, "Progressing", "Paused")

        await it.until("Progressing to say that it is paused", paused)
        node, writes = await node_of(it, "0-s1"), len(it.gate.writes)
        async with cordoned(it, node):

            async def seen() -> bool:
                stages = (await it.status()).instances[0].stages
                return "is cordoned" in (stages[1].leaving or "")

            await it.until("the cordon to be seen", seen)
            await a_whole_round(it)
            assert touched(it, writes) == []
            lost = (await it.pod_of("1-s0"))["metadata"]["name"]
            await it.api.delete(f"api/v1/namespaces/{it.namespace}/pods/{lost}")

            async def replaced() -> bool:
                return it.made(writes) == {"1-s0": 1} and await it.as_specified()

            await it.until("another pod of 1-s0", replaced)
            await a_whole_round(it)
            assert it.made(writes) == {"1-s0": 1}
            await annotate(it, "paused", None)
            await moves(it, "0-s1", node)

    tell(story, "paused")


def test_the_breaker_holds_when_three_nodes_fail_at_once_until_a_person_has_looked(tell: Tell) -> None:
    async def story(it: Simulation) -> None:
        await create(it)
        slots = ("0-s0", "0-s1", "1-s1")
        nodes = [await node_of(it, slot) for slot in slots]
        async with faulty(it, nodes):
            writes = len(it.gate.writes)
            # With one write the same follows from all three.
            rules = [{"type": FAULT, "status": "True", "action": "Move"}]
            await it.api.patch(it.path, {"spec": {"recovery": {"nodeConditions": rules}}})

            async def tripped() -> object:
                return await says(it, "Stalled", "BreakerTripped")

            await it.until("Stalled to say that the breaker has tripped", tripped)
            await a_whole_round(it)
            assert touched(it, writes) == []
            status = await it.status()
            assert status.breaker is not None and status.breaker.tripped
            assert await says(it, "Ready", "AllInstancesServing")
            (note,) = [note for reason, note in await it.events() if reason == "BreakerTripped"]
            assert all(str(node) in note for node in nodes)
            assert f"kubectl -n {it.namespace} annotate --overwrite rllm {NAME} resilientllm.dev/retry=" in note
            await annotate(it, "retry", "looked")
            for slot, node in zip(slots, nodes, strict=True):
                await moves(it, slot, node)
            assert it.made(writes) == dict.fromkeys(slots, 1)

    tell(story, "breaker")


async def crash(it: Simulation, pod: Json, restarts: int, at: datetime, ready: bool) -> None:
    """As the kubelet tells of a process that ended and was started again, or waits for that."""
    terminated = {"exitCode": 1, "reason": "Error", "message": LAST_WORDS, "finishedAt": _time(at)}
    state = {"running": {"startedAt": _time()}} if ready else {"waiting": {"reason": "CrashLoopBackOff"}}
    container = pod["status"]["containerStatuses"][0] | {
        "ready": ready,
        "restartCount": restarts,
        "state": state,
        "lastState": {"terminated": terminated | {"startedAt": _time(at)}},
    }
    conditions = [
        each | ({"status": str(ready)} if each["type"] in ("Ready", "ContainersReady") else {})
        for each in pod["status"]["conditions"]
    ]
    path = f"api/v1/namespaces/{it.namespace}/pods/{pod['metadata']['name']}/status"
    await it.api.patch(path, {"status": {"containerStatuses": [container], "conditions": conditions}})


def test_a_node_on_which_a_stage_fails_again_and_again_is_left_with_the_evidence(tell: Tell) -> None:
    async def story(it: Simulation) -> None:
        await create(it)
        pod, since = await it.pod_of("0-s1"), datetime.now(UTC) - timedelta(seconds=10)
        node = pod["spec"]["nodeName"]
        for restarts in (1, 2, 3):
            await crash(it, pod, restarts, since + timedelta(seconds=restarts), ready=True)

            async def recorded(restarts: int = restarts) -> bool:
                return len((await it.status()).failures) == restarts

            await it.until(f"{restarts} failures in the status", recorded)
        await moves(it, "0-s1", node)
        (avoided,) = (await it.status()).nodes
        assert (avoided.name, avoided.failures) == (node, 3)
        assert "stage 0.1: Exited with exit code 1, RuntimeError: CUDA error" in avoided.evidence
        (note,) = [note for reason, note in await it.events() if reason == "NodeAvoided"]
        assert node in note and "RuntimeError" in note
        (term,) = (await it.pod_of("0-s1"))["spec"]["affinity"]["nodeAffinity"][
            "requiredDuringSchedulingIgnoredDuringExecution"
        ]["nodeSelectorTerms"]
        assert term["matchFields"] == [{"key": "metadata.name", "operator": "NotIn", "values": [node]}]

    tell(story, "offender")


def test_a_stage_that_crashes_again_and_again_shows_its_last_words_and_is_left_to_the_kubelet(tell: Tell) -> None:
    async def story(it: Simulation) -> None:
        await create(it)
        pod, writes = await it.pod_of("0-s1"), len(it.gate.writes)
        await crash(it, pod, 4, datetime.now(UTC), ready=False)

        async def stalled() -> object:
            return await says(it, "Stalled", "ContainerCrashing")

        await it.until("Stalled to say that it crashes", stalled)
        message = await says(it, "Stalled", "ContainerCrashing")
        assert message is not None and "has ended 4 times, last with exit code 1: RuntimeError: CUDA error" in message
        stage = (await it.status()).instances[0].stages[1]
        assert stage.restarts == 4 and stage.last_exit is not None
        assert (stage.last_exit.code, stage.last_exit.message) == (1, LAST_WORDS.rstrip())
        await a_whole_round(it)
        assert touched(it, writes) == [], "the kubelet starts it again, ever more slowly"
        assert [note for reason, note in await it.events() if reason == "ContainerCrashing"] == [message]
        await crash(it, pod, 4, datetime.now(UTC), ready=True)

        async def mended() -> object:
            return await says(it, "Stalled", "AsSpecified")

        await it.until("Stalled to say that it does not any more", mended)

    tell(story, "crashing")


def _time(at: datetime | None = None) -> str:
    return (at or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ")
