"""The API server is down while a node dies: streams go on, nothing is decided blindly, and it is made up for later."""

from __future__ import annotations

import time

import pytest
from resilientllm_api.engine_state import RecoveryKind

from e2e.scenarios import fault
from e2e.scenarios.scenario import TIMEOUT_SECONDS, Scenario

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(TIMEOUT_SECONDS)]

AWAY_SECONDS = 12.0
"""Longer than the cluster waits before it calls a node lost: when the API server is back, all nodes look lost,
and for a minute some of them do again and again, until the last of Kubernetes' own parts has found it."""
MADE_SECONDS = 30.0
BOUND_SECONDS = 180.0
"""A minute more than without the outage: so long Kubernetes' scheduler may take to ask again, which is when it sees the
new pod (client-go's back-off: up to 30 s, and up to as much again at random). That pod is made within seconds."""


def test_a_node_killed_while_the_api_server_is_down_is_made_up_for_when_it_is_back(scenario: Scenario) -> None:
    lost = scenario.before.alone[0]
    others = {pod.uid: pod.restarts for pod in scenario.before.pods if pod.uid != lost.uid}
    pids = fault.pids_of(scenario.ground, lost)
    scenario.start_load()

    stopped = scenario.did(fault.stop_api_server(scenario.ground))
    killed = scenario.did(fault.kill_node(scenario.ground, lost, pids))
    # All streams of all engines get as far as the middle with nobody but the engines to bring that about.
    scenario.meet_streams()
    time.sleep(max(0.0, killed.at_seconds + AWAY_SECONDS - time.monotonic()))
    scenario.did(fault.start_api_server(scenario.ground))
    scenario.until("replacement made", lambda look: bool(scenario.made_since(scenario.before)), MADE_SECONDS)
    after = scenario.until_whole(BOUND_SECONDS)

    verdict = scenario.judge()
    assert verdict.met >= 6 and verdict.unharmed, verdict.problems
    first, *_ = after.recoveries_since(stopped.at)
    assert (first.kind, first.instance, first.stages) == (RecoveryKind.BORROW, lost.instance, (lost.stage,))
    assert first.detected_at > killed.at and first.requests_affected > 0
    assert [pod.place for pod in scenario.made_since(scenario.before)] == [lost.place], "nothing else was replaced"
    assert {pod.uid: pod.restarts for pod in after.pods if pod.uid in others} == others, "all others were left alone"
