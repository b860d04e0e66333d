"""The operator is killed between any two of its actions, and the next one finishes the job, once.

On a real API server. Engines and kubelets are simulated, because this is about what the operator writes.
"""

from __future__ import annotations

from itertools import repeat

import pytest

from tests.operator.story import NAME, SLOTS, Simulation, Tell, create

_FOUND = {"StageLeaving", "NodeWarning"}
pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(900)]


async def lose_a_node(it: Simulation, slot: str = "0-s1") -> None:
    """A stage's node loses its power. Its pod hangs in Terminating until the node is back."""
    since, events = len(it.gate.writes), await it.events()
    lost = await it.pod_of(slot)
    node = lost["spec"]["nodeName"]
    others = {pod["metadata"]["name"].rsplit("-", 1)[0] for pod in await it.pods() if pod["spec"]["nodeName"] == node}
    it.kubelets.down.add(node)
    await it.kubelets.say_ready(node, "Unknown")

    async def replaced() -> bool:
        pods = [pod for pod in await it.pods() if pod["spec"].get("nodeName") != node]
        at_home = [engine.state.serving and engine.state.on_own_stages for engine in it.engines.engines.values()]
        return not it.runs(lost) and len(pods) == len(SLOTS) and at_home == [True, True]

    await it.until(f"a stage in place of {slot}", replaced)
    it.kubelets.down.discard(node)
    await it.kubelets.say_ready(node, "True")
    await it.until("an object that is as specified", it.as_specified)
    assert it.made(since) == {name.removeprefix(f"{NAME}-"): 1 for name in others}
    told = await it.events() - events
    assert any("stands in" in note for _, note in told), told
    # What engines did is told once. What an operator found is told again if it ended before it wrote that down.
    assert all(count == 1 or (count == 2 and reason in _FOUND) for (reason, _), count in told.items()), told


async def roll_out(it: Simulation) -> None:
    since = len(it.gate.writes)
    await it.api.patch(it.path, {"spec": {"image": "worker:2"}})
    await it.until("an object that is as specified", it.as_specified)
    assert it.made(since) == dict.fromkeys(SLOTS, 1)


async def delete(it: Simulation) -> None:
    since = len(it.gate.writes)
    await it.api.delete(it.path)

    async def gone() -> bool:
        return not await it.pods() and not await it.api.items(f"api/v1/namespaces/{it.namespace}/services")

    await it.until("no pod and no service", gone)
    assert it.made(since) == {}


def test_an_operator_that_dies_after_every_single_write_gets_there(tell: Tell) -> None:
    async def story(it: Simulation) -> None:
        it.budgets = repeat(1)
        for act in (create, lose_a_node, roll_out, delete):
            lives, writes = it.begun, len(it.gate.writes)
            await act(it)
            if act is not delete:
                assert it.begun - lives >= len(it.gate.writes) - writes - 1 > 3
        assert it.engines.violations == []

    tell(story, "every-write")


def test_a_recovery_with_one_death_in_it_ends_as_one_without(tell: Tell) -> None:
    """In every gap in turn, until there are no more writes to die after."""
    gap, died = 0, True

    async def story(it: Simulation) -> None:
        nonlocal died
        await create(it)
        it.gate.left = gap
        await lose_a_node(it)
        assert it.engines.violations == []
        died = it.begun > 1

    while died:
        gap += 1
        tell(story, f"gap-{gap}")
    assert gap > 6
