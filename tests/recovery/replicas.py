"""What the tests of replicas do with a cluster: publish other plans, wait for copies, and read what a kill has cost."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from resilientllm_api.engine_state import EngineState, Recovery, RecoveryKind, ReplicationState
from resilientllm_api.plan import Plan, StageId, StageRef
from resilientllm_api.ports import PLAN_PATH
from resilientllm_cli.comparison import Tokens
from resilientllm_cli.local.cluster import LocalCluster
from resilientllm_cli.local.state import LocalState
from resilientllm_cli.streams import Sampling, Stream, connect, model_name, run_stream

from tests.recovery.load import READY_SECONDS, Ask, compared, stream_all, undisturbed

SETTLED_SECONDS = 1.0
"""Many heartbeats: what an idle instance says for so long is no old news."""
SHARED_TOKENS = 256


# --- plans ---------------------------------------------------------------------------------------------------------


def plan_of(cluster: LocalCluster, instance: int) -> Plan:
    """The engine writes every plan that it is given to its file."""
    return Plan.model_validate_json(cluster.files.plan(instance).read_text())


def publish(cluster: LocalCluster, instance: int, **changes: Any) -> None:
    """Gives an engine its plan with ``changes``, as the operator would, and waits until it is in force."""
    old = plan_of(cluster, instance)
    plan = old.model_copy(update={**changes, "version": old.version + 1})
    urllib.request.urlopen(
        urllib.request.Request(
            cluster.engines[instance].control_url + PLAN_PATH,
            plan.model_dump_json(by_alias=True).encode(),
            {"Authorization": f"Bearer {cluster.token}", "Content-Type": "application/json"},
            method="PUT",
        ),
        timeout=10,
    ).close()
    wait_state(cluster, instance, lambda state: state.plan_version == plan.version, f"plan {plan.version}")


@contextmanager
def published(cluster: LocalCluster, instance: int, **changes: Any) -> Iterator[None]:
    """`publish`, and in the end the plan that was there before."""
    before = plan_of(cluster, instance)
    publish(cluster, instance, **changes)
    try:
        yield
    finally:
        publish(cluster, instance, **{name: getattr(before, name) for name in changes})


def reached_at(plan: Plan, stage: StageId, address: str) -> dict[str, Any]:
    """The change of ``plan`` by which its engine and stages reach one of the donors at another address."""
    return {
        "donors": tuple(
            tuple(StageRef(id=donor.id, address=address) if donor.id == stage else donor for donor in donors)
            for donors in plan.donors
        )
    }


# --- what engines say ----------------------------------------------------------------------------------------------


def wait_state(
    cluster: LocalCluster,
    instance: int,
    holds: Callable[[EngineState], bool],
    what: str,
    timeout_seconds: float = READY_SECONDS,
) -> EngineState:
    """Engines tell their state ten times a second."""
    deadline = time.monotonic() + timeout_seconds
    while (state := cluster.engine_state(instance)) is None or not holds(state):
        assert time.monotonic() < deadline, f"expected {what} within {timeout_seconds:g} s, found {state}"
        cluster.check()
        time.sleep(0.05)
    return state


def all_kept(place: ReplicationState) -> bool:
    return place.healthy and place.lag_tokens == 0 and place.stored_blocks == place.sealed_blocks > 0


def wait_all_kept(cluster: LocalCluster, instance: int, stage: int | None = None) -> EngineState:
    """Of an instance where nothing goes on: waits until all that its stages, or the one, have sealed is kept."""
    since, before = time.monotonic(), None

    def settled(state: EngineState) -> bool:
        nonlocal since, before
        places = [place for place in state.replication if stage in (None, place.stage)]
        figures = [(place.sealed_blocks, place.kept_by) for place in places]
        if not places or not all(map(all_kept, places)) or figures != before:
            since, before = time.monotonic(), figures
        return time.monotonic() - since > SETTLED_SECONDS

    return wait_state(cluster, instance, settled, "copies of all that is sealed")


def last_recovery(cluster: LocalCluster, instance: int, kind: RecoveryKind) -> Recovery:
    state = cluster.engine_state(instance)
    assert state is not None
    return next(recovery for recovery in reversed(state.recoveries) if recovery.kind is kind)


def recoveries(cluster: LocalCluster, instance: int) -> int:
    state = cluster.engine_state(instance)
    assert state is not None
    return state.recoveries_total


def metric(url: str, name: str) -> float:
    """Of vLLM, without its prefix."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = re.search(rf"^vllm:{name}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)
    assert found is not None, text
    return float(found[1])


def kv_usage(url: str) -> float:
    """The part of its KV blocks that an engine has in use, as of its last step; here one is made for that."""
    undisturbed(url, [Ask(prompt=(21, 22, 23), sampling=Sampling(2))])
    return metric(url, "kv_cache_usage_perc")


# --- disturbances --------------------------------------------------------------------------------------------------


@contextmanager
def paused(cluster: LocalCluster, instance: int, stage: int) -> Iterator[None]:
    """A stage stands still, and so does its pipeline, as soon as the steps in flight have come to it.

    Whatever all others have yet to do, such as to copy blocks, they can finish, so it can be counted.
    """
    pid = cluster.stage(instance, stage).pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def killed(cluster: LocalCluster, instance: int, stage: int) -> Iterator[None]:
    """A stage is killed, and the process that is started in its place stands still for as long as this lasts."""
    pid = cluster.kill_stage(instance, stage)

    def restarted(now: LocalState) -> bool:
        return any(
            (entry.instance, entry.stage) == (instance, stage) and entry.pid not in (None, pid) for entry in now.stages
        )

    cluster.wait_for(restarted, READY_SECONDS, f"a new process for stage {instance}.{stage}")
    with paused(cluster, instance, stage):
        yield


# --- load ----------------------------------------------------------------------------------------------------------


def sharing(count: int, *, tokens: int, own_tokens: int, first: int = 0) -> list[Ask]:
    """As `asks`, but the prompts have their beginning in common."""
    return [
        Ask(
            prompt=(
                *((13 * place) % 200 + 20 for place in range(SHARED_TOKENS)),
                *((31 * index + 7 * place) % 200 + 20 for place in range(own_tokens + 9 * (index % 16))),
            ),
            sampling=Sampling(tokens, 1.0, seed=2000 + index) if index % 2 else Sampling(tokens),
        )
        for index in range(first, first + count)
    ]


def delivered(wanted: Sequence[Ask]) -> Tokens:
    """What `compared` gives when nothing was harmed."""
    return Tokens(delivered=sum(ask.sampling.max_tokens for ask in wanted))


def keep_asking(
    url: str, wanted: Sequence[Ask], expected: Sequence[Sequence[int]], disturb: Callable[[], object]
) -> int:
    """One client for each of ``wanted`` asks again and again until ``disturb``, in a thread, is over.

    Every answer must be the expected one. Returns how many there were.
    """

    async def run() -> int:
        disturbing = asyncio.create_task(asyncio.to_thread(disturb))
        answers = 0
        async with connect(url) as client:
            model = await model_name(client)

            async def ask_on(place: int) -> None:
                nonlocal answers
                while not disturbing.done():
                    stream = await run_stream(
                        client, model, wanted[place].prompt, wanted[place].sampling, Stream(place)
                    )
                    assert compared([expected[place]], [stream]).unharmed, stream
                    answers += 1

            try:
                await asyncio.gather(*map(ask_on, range(len(wanted))))
            finally:
                await disturbing
        return answers

    return asyncio.run(run())


def with_aborts(
    url: str, wanted: Sequence[Ask], kill: Callable[[], object], *, after_tokens: int, aborted: Sequence[int]
) -> list[Stream]:
    """The streams of ``wanted`` but those ``aborted``, whose clients leave while ``kill`` runs and after it."""

    async def run() -> list[Stream]:
        reached = asyncio.Event()

        def on_token(stream: Stream) -> None:
            if len(stream.tokens) >= after_tokens:
                reached.set()

        tasks = [asyncio.create_task(stream_all(url, [ask], on_token)) for ask in wanted]
        await reached.wait()
        assert not any(task.done() for task in tasks), "a stream was over before the kill"
        half = len(aborted) // 2
        killing = asyncio.create_task(asyncio.to_thread(kill))
        for place in aborted[:half]:
            tasks[place].cancel()
        await killing
        for place in aborted[half:]:
            tasks[place].cancel()
        await asyncio.wait(tasks)
        assert all(tasks[place].cancelled() for place in aborted)
        return [task.result()[0] for place, task in enumerate(tasks) if place not in aborted]

    return asyncio.run(run())
