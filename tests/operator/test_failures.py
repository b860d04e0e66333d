"""The record of failures, nodes that are avoided because of it, the breaker for correlated faults, and mode Observe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from resilientllm_api.crd import FailureCause, FailureStatus
from resilientllm_api.engine_state import EnginePhase, LossReason, Recovery, RecoveryKind
from resilientllm_api.plan import StageId
from resilientllm_operator.actions import Announce, ApplyEndpoints, CreatePod, CreateToken, DeletePod, PublishPlan
from resilientllm_operator.assessment import LAST_WORDS_LINES, LAST_WORDS_MOST
from resilientllm_operator.breaker import AT_ONCE, QUIET
from resilientllm_operator.failures import KEPT, ONE_INCIDENT
from resilientllm_operator.names import Slot
from resilientllm_operator.node_affinity import nodes_kept_off
from resilientllm_operator.signals import NOT_READY_PATIENCE
from resilientllm_operator.succession import PATIENCE
from resilientllm_operator.world import Ailment, Exit, PodView, World

from tests.operator.builders import (
    NOW,
    borrowed,
    condition,
    decided,
    engine_state,
    healthy_world,
    new_world,
    of_type,
    pod,
    settled,
    silent,
    stage,
    status_of,
    with_condition,
    with_engine,
    with_node,
    with_nodes,
    with_pod,
    with_pods,
    with_spec,
    with_status,
    without_node,
    without_pod,
)

MINUTE = timedelta(minutes=1)
PLACE = stage(0, 1)
CRASH = "Traceback\nRuntimeError: CUDA error: an illegal memory access was encountered\n"


def failed(world: World, at: datetime = NOW, code: int = 1, slot: Any = PLACE, message: str = CRASH) -> World:
    """The process of a stage ends, and the kubelet has started it again."""
    return with_pod(world, slot, restarts=1, last_exit=Exit(code, message, at))


def pod_in(world: World, slot: Slot) -> PodView:
    return next(each for each in world.pods if each.slot == slot)


def failures(world: World, at: datetime = NOW) -> Sequence[FailureStatus]:
    return status_of(world, at).failures


def avoided(world: World, at: datetime = NOW) -> list[str]:
    return [each.name for each in status_of(world, at).nodes]


def remembering(*known: FailureStatus, world: World | None = None) -> World:
    """The status has these failures."""
    world = world or with_nodes(healthy_world())
    return with_status(world, world.object.status.model_copy(update={"failures": known}))


def failure(minutes_ago: float = 0, node: str = "node-1", place: str = "0.1", **changes: Any) -> FailureStatus:
    return FailureStatus(
        at=NOW - minutes_ago * MINUTE,
        **{
            "cause": FailureCause.EXITED,
            "stage": place,
            "pod": f"pod-{place}",
            "node": node,
            "exit_code": 1,
            **changes,
        },
    )


def without_api_server(world: World) -> World:
    """As it is found when the API server is back: no node could say that it is well."""
    for node in ("node-0", "node-1", "node-2"):
        world = with_condition(with_node(world, node), node, "Ready", "Unknown", since=NOW)
    return world


class TestTheRecord:
    def test_has_the_exit_of_a_process_with_its_last_line(self) -> None:
        (only,) = failures(failed(healthy_world(), NOW - MINUTE))
        assert (only.cause, only.stage, only.node, only.exit_code) == ("Exited", "0.1", "node-1", 1)
        assert only.at == NOW - MINUTE
        assert only.message == "RuntimeError: CUDA error: an illegal memory access was encountered"

    def test_has_each_exit_once(self) -> None:
        once = settled(failed(healthy_world(), NOW - MINUTE))
        assert len(failures(once)) == 1
        assert len(failures(failed(once, NOW))) == 2

    @pytest.mark.parametrize("code", [0, 2])
    def test_does_not_have_what_is_no_fault(self, code: int) -> None:
        assert failures(failed(healthy_world(), code=code)) == ()

    def test_does_not_have_the_end_of_a_pod_that_was_told_to_end(self) -> None:
        assert failures(with_pod(failed(healthy_world()), PLACE, leaving=True)) == ()

    def test_does_not_have_what_is_long_ago(self) -> None:
        assert failures(failed(healthy_world(), NOW - timedelta(hours=2))) == ()

    def test_has_an_eviction_once(self) -> None:
        ended = with_pod(healthy_world(), PLACE, leaving=True, ended=True)
        assert [each.cause for each in failures(ended)] == ["Ended"]
        assert len(failures(settled(ended), NOW + MINUTE)) == 1

    def test_has_a_sick_device_once(self) -> None:
        sick = with_pod(healthy_world(), PLACE, ailments=(Ailment("nvidia.com/gpu", "GPU-2", certain=True),))
        (only,) = failures(sick)
        assert (only.cause, only.message) == ("DeviceUnhealthy", "nvidia.com/gpu GPU-2")
        assert len(failures(settled(sick), NOW + MINUTE)) == 1

    def test_has_what_befell_a_node_once_and_not_for_each_stage_there(self) -> None:
        faulty = with_condition(healthy_world(), "node-1", "GpuMemWatch", since=NOW - MINUTE)
        (only,) = failures(faulty)
        assert (only.cause, only.node, only.stage, only.at) == ("NodeCondition", "node-1", None, NOW - MINUTE)
        assert len(failures(settled(faulty), NOW + MINUTE)) == 1
        again = with_condition(settled(faulty), "node-1", "GpuMemWatch", since=NOW + MINUTE)
        assert len(failures(again, NOW + MINUTE)) == 2

    def test_has_what_nobody_dates_once(self) -> None:
        """Who sets a condition by hand may leave its time out."""
        world = with_condition(healthy_world(), "node-1", "GpuMemWatch")
        for minute in range(5):
            world = settled(world, NOW + minute * MINUTE)
        assert len(world.object.status.failures) == 1
        crashed = failed(healthy_world())
        undated = with_pod(crashed, PLACE, last_exit=Exit(1, CRASH))
        assert len(failures(settled(undated), NOW + MINUTE)) == 1

    def test_dates_a_fault_that_was_there_first_from_when_the_stage_came(self) -> None:
        world = with_condition(healthy_world(), "node-1", "Ready", "Unknown", since=NOW - timedelta(days=1))
        (only,) = failures(world)
        assert (only.cause, only.at) == ("NodeLost", NOW - 5 * MINUTE)

    def test_has_a_node_that_is_gone(self) -> None:
        assert [each.cause for each in failures(without_node(healthy_world(), "node-2"))] == ["NodeLost"]

    def test_does_not_have_what_is_done_on_purpose_or_only_warned_of(self) -> None:
        world = with_node(healthy_world(), "node-1", unschedulable=True)
        assert failures(with_condition(world, "node-2", "GpuDcgmConnectivityFailure", since=NOW)) == ()

    @pytest.mark.parametrize(
        ("reason", "causes"),
        [
            (LossReason.SILENCE, ["Silent"]),
            (LossReason.UNREACHABLE, ["Silent"]),
            (LossReason.HANG, ["Hung"]),
            (LossReason.RESET, []),
        ],
    )
    def test_has_stages_that_fell_silent_or_hung(self, reason: LossReason, causes: list[str]) -> None:
        """A process that ends says so itself; one that hangs does not."""
        told = Recovery(id="r1", kind=RecoveryKind.BORROW, stages=(1,), reason=reason, detected_at=NOW)
        world = with_engine(healthy_world(), 0, borrowed(0, 1, donor=1, recoveries=(told,)))
        assert [(each.cause, each.stage, each.node) for each in failures(world)] == [
            (cause, "0.1", "node-1") for cause in causes
        ]
        assert len(failures(settled(world), NOW + MINUTE)) == len(causes)

    @pytest.mark.parametrize(
        ("created", "blamed"),
        [(NOW - 2 * MINUTE, ("tiny-0-s1-lost", "node-1")), (NOW, (None, None)), (None, ("tiny-0-s1-told", "node-7"))],
        ids=["the lost pod is still there", "another has taken its place", "nothing is there any more"],
    )
    def test_blames_the_node_where_the_stage_was_then(
        self, created: datetime | None, blamed: tuple[str | None, str | None]
    ) -> None:
        """A loss is told when it is over, which may be when the next pod, on another node, has loaded."""
        told = Recovery(
            id="r1", kind=RecoveryKind.BORROW, stages=(1,), reason=LossReason.SILENCE, detected_at=NOW - MINUTE
        )
        world = settled(with_pod(healthy_world(), stage(0, 1), name="tiny-0-s1-told", node="node-7"))
        lost, following = ({"name": f"tiny-0-s1-{name}"} for name in ("lost", "next"))
        if created is None:
            world = without_pod(world, stage(0, 1))
        elif created < NOW - MINUTE:
            world = with_pod(world, stage(0, 1), created=created, node="node-1", leaving=True, **lost)
            world = replace(world, pods=(*world.pods, pod(world.object, stage(0, 1), created=NOW, **following)))
        else:
            world = settled(with_pod(world, stage(0, 1), created=created, node="node-2", **following))
        world = with_engine(world, 0, borrowed(0, 1, donor=1, recoveries=(told,)))
        assert [(each.pod, each.node) for each in failures(world)] == [blamed]

    def test_is_bounded_and_what_it_forgot_does_not_come_back(self) -> None:
        many = tuple(failure(KEPT - number, place="9.9", message=str(number)) for number in range(KEPT))
        world = remembering(*many)
        newer = failed(world, NOW)
        assert len(failures(newer)) == KEPT
        assert failures(newer)[-1].stage == "0.1"
        assert failures(failed(world, NOW - timedelta(minutes=KEPT + 1))) == many

    def test_shows_restarts_and_last_words_at_the_stage(self) -> None:
        shown = status_of(failed(healthy_world(), NOW, code=139)).instances[0].stages[1]
        assert shown.restarts == 1
        assert shown.last_exit is not None
        assert (shown.last_exit.code, shown.last_exit.at) == (139, NOW)
        assert shown.last_exit.message == CRASH.rstrip()

    def test_keeps_the_end_of_last_words_and_not_too_much(self) -> None:
        """A status is written often, and by a process that ends nobody is asked how long its lines are."""
        words = "\n".join([*(f"line {number}" for number in range(100)), "x" * 5000, "the end\n"])
        shown = status_of(failed(healthy_world(), NOW, message=words)).instances[0].stages[1]
        assert shown.last_exit is not None
        assert len(shown.last_exit.message) == LAST_WORDS_MOST and shown.last_exit.message.endswith("x\nthe end")
        words = "\n".join(f"line {number}" for number in range(100))
        shown = status_of(failed(healthy_world(), NOW, message=words)).instances[0].stages[1]
        assert shown.last_exit is not None
        assert shown.last_exit.message.splitlines() == words.splitlines()[-LAST_WORDS_LINES:]


class TestANodeThatFailsAgainAndAgain:
    def test_is_avoided_with_the_evidence(self) -> None:
        world = remembering(failure(20), failure(10), failure(5))
        (node,) = status_of(world).nodes
        assert (node.name, node.failures, node.until) == ("node-1", 3, NOW + 40 * MINUTE)
        assert node.evidence.startswith("2026-11-21 11:55:00 stage 0.1: Exited with exit code 1")

    def test_is_not_after_fewer_failures_or_as_many_in_a_longer_time(self) -> None:
        assert avoided(remembering(failure(20), failure(10))) == []
        assert avoided(remembering(failure(70), failure(10), failure(5))) == []

    def test_is_not_any_more_when_the_window_is_over(self) -> None:
        world = remembering(failure(20), failure(10), failure(5))
        assert avoided(world, NOW + 39 * MINUTE) == ["node-1"]
        assert avoided(world, NOW + 40 * MINUTE) == []

    def test_counts_what_failed_together_once(self) -> None:
        together = [failure(10, place=f"0.{n}", pod=f"pod-{n}") for n in range(3)]
        assert avoided(remembering(*together)) == []
        apart = [failure(10 + 2 * n * ONE_INCIDENT / MINUTE, place=f"0.{n}", pod=f"pod-{n}") for n in range(3)]
        assert avoided(remembering(*apart)) == ["node-1"]

    def test_counts_a_process_that_ends_at_once_each_time(self) -> None:
        assert avoided(remembering(*(failure(1 + n / 60) for n in range(3)))) == ["node-1"]

    def test_is_not_to_blame_for_a_stage_that_fails_elsewhere_in_the_same_way(self) -> None:
        crashes = [failure(20), failure(10), failure(5)]
        assert avoided(remembering(*crashes, failure(1, node="node-9"))) == []
        assert avoided(remembering(*crashes, failure(1, node="node-9", exit_code=139))) == ["node-1"]
        assert avoided(remembering(*crashes, failure(1, node="node-9", place="1.0"))) == ["node-1"]

    def test_may_have_as_many_failures_as_the_spec_says(self) -> None:
        world = remembering(failure(20), failure(10))
        policy = {"repeatOffender": {"failures": 2, "window": "15m"}}
        assert avoided(with_spec(world, recovery=policy)) == []
        assert avoided(with_spec(world, recovery=policy | {"repeatOffender": {"failures": 2, "window": "30m"}})) == [
            "node-1"
        ]

    def test_is_left_by_its_stages_and_gets_no_new_ones(self) -> None:
        world = remembering(failure(20), failure(10), failure(5))
        made = of_type(decided(world), CreatePod)
        assert [each.name.rsplit("-", 1)[0] for each in made] == ["tiny-0-s1", "tiny-1-s0"]
        assert all(nodes_kept_off(each.manifest["spec"]) == {"node-1"} for each in made)
        assert "node node-1 is avoided: 3 failures of stages there" in made[0].why
        (missing,) = [each for each in of_type(decided(without_pod(world, stage(1, 1))), CreatePod) if not each.why]
        assert nodes_kept_off(missing.manifest["spec"]) == {"node-1"}

    def test_is_announced_once(self) -> None:
        def events(world: World) -> list[str]:
            return [each.reason for each in of_type(decided(world), Announce)]

        world = remembering(failure(20), failure(10), failure(5))
        assert events(world) == ["StageLeaving", "StageLeaving", "NodeAvoided"]
        assert events(settled(world)) == []


class TestAStageThatCrashesWhereverItIs:
    def world(self) -> World:
        crashes = [failure(20), failure(10, pod="pod-a"), failure(5), failure(1, node="node-9")]
        return with_pod(remembering(*crashes), PLACE, ready=False, restarts=4, last_exit=Exit(1, CRASH, NOW - MINUTE))

    def test_stays_and_stops_with_a_reason(self) -> None:
        assert of_type(decided(self.world()), CreatePod, DeletePod) == []
        status, reason, message = condition(self.world(), "Stalled")
        assert (status, reason) == ("True", "ContainerCrashing")
        assert "last with exit code 1: RuntimeError: CUDA error" in message


def faulty(*nodes: str, since: datetime = NOW, world: World | None = None) -> World:
    """The same is said of several nodes."""
    world = world or with_nodes(healthy_world())
    for node in nodes:
        world = with_condition(world, node, "GpuMemWatch", since=since)
    return world


class TestTheBreaker:
    def test_trips_when_three_nodes_fail_at_once(self) -> None:
        breaker = status_of(faulty("node-0", "node-1", "node-2")).breaker
        assert breaker is not None and breaker.tripped
        assert "3 nodes failed within 60 seconds: node-0, node-1, node-2" in breaker.message
        assert 'resilientllm.dev/retry="$(date)" resets it' in breaker.message

    def test_trips_for_two_nodes_if_that_is_more_than_half(self) -> None:
        assert status_of(faulty("node-0", "node-1")).breaker is not None
        wide = with_nodes(healthy_world(instances=3, stages=3), "node-3")
        spread = replace(wide, pods=tuple(replace(p, node=f"node-{n}") for n, p in enumerate(wide.pods)))
        many = with_nodes(replace(spread, nodes={}))
        assert status_of(faulty("node-0", "node-1", world=settled(many))).breaker is None

    def test_does_not_trip_for_one_node_whatever_is_on_it(self) -> None:
        assert status_of(faulty("node-1")).breaker is None

    def test_does_not_trip_for_what_happens_one_after_the_other(self) -> None:
        world = settled(faulty("node-0", since=NOW - 2 * AT_ONCE))
        assert status_of(faulty("node-1", world=world)).breaker is None

    def test_does_not_trip_for_cordons(self) -> None:
        world = with_nodes(healthy_world())
        for node in ("node-0", "node-1", "node-2"):
            world = with_node(world, node, unschedulable=True)
        assert status_of(world).breaker is None

    def test_does_not_trip_for_nodes_that_are_not_ready_while_their_stages_are_heard(self) -> None:
        """After a while without an API server Kubernetes takes all nodes for lost, and one of them may be."""
        world = settled(without_api_server(with_engine(healthy_world(), 0, borrowed(0, 1, donor=1))))
        assert [each.node for each in failures(world)] == ["node-1"]
        assert status_of(world).breaker is None
        assert [each.name.rsplit("-", 1)[0] for each in of_type(decided(world), CreatePod)] == ["tiny-0-s1"]

    def test_trips_for_nodes_that_stay_so(self) -> None:
        world = settled(without_api_server(healthy_world()))
        assert failures(world) == () and status_of(world, NOW + NOT_READY_PATIENCE).breaker is not None
        assert of_type(decided(world, NOW + NOT_READY_PATIENCE), CreatePod) == []

    def test_does_not_trip_for_what_never_served(self) -> None:
        world = with_nodes(with_pods(new_world()))
        for slot in (stage(0, 0), stage(0, 1), stage(1, 1)):
            world = failed(world, slot=slot)
        assert status_of(world).breaker is None

    def test_keeps_what_may_still_work(self) -> None:
        world = faulty("node-0", "node-1", "node-2")
        for look in (world, settled(world)):
            assert of_type(decided(look), CreatePod, DeletePod, PublishPlan) == []

    def test_keeps_a_stage_that_serves_though_its_device_is_said_to_be_sick(self) -> None:
        sick = (Ailment("nvidia.com/gpu", "GPU-2", certain=True),)
        world = with_nodes(healthy_world())
        for slot in (stage(0, 0), stage(0, 1), stage(1, 1)):
            world = with_pod(world, slot, ailments=sick)
        assert of_type(decided(world), PublishPlan) == []
        assert of_type(decided(settled(world)), PublishPlan) == []
        left = with_engine(settled(world), 0, borrowed(0, 1, donor=1))
        (plan, _) = [each.plan for each in of_type(decided(left), PublishPlan)]
        assert [str(each) for each in plan.lost] == ["0.1"], "what is not used any more need not be used again"

    def test_still_replaces_what_is_certainly_gone(self) -> None:
        world = without_pod(settled(faulty("node-0", "node-1", "node-2")), PLACE)
        assert [each.name.rsplit("-", 1)[0] for each in of_type(decided(world), CreatePod)] == ["tiny-0-s1"]

    def test_has_nodes_that_are_really_gone_wait_for_eviction_and_says_what_to_do(self) -> None:
        world = healthy_world(stages=3)
        apart = tuple(replace(each, node=f"node-{number}") for number, each in enumerate(world.pods))
        world = settled(with_nodes(replace(world, pods=apart)))
        lost = [stage(0, number) for number in range(3)]
        for slot in lost:
            world = with_condition(world, str(pod_in(world, slot).node), "Ready", "Unknown", since=NOW)
        state = engine_state(0, stages=3)
        served = [
            each.model_copy(update={"served_by": StageId(instance=1, stage=each.stage), "own_connected": False})
            for each in state.stages
        ]
        degraded = {"phase": EnginePhase.DEGRADED, "on_own_stages": False, "stages": tuple(served)}
        world = with_engine(world, 0, state.model_copy(update=degraded))
        assert of_type(decided(world), CreatePod) == []
        (told,) = [each for each in of_type(decided(world), Announce) if each.reason == "BreakerTripped"]
        for words in (told.note, condition(world, "Stalled")[2]):
            assert "kubectl -n default annotate --overwrite rllm tiny resilientllm.dev/retry=" in words
            assert "A pod on a node that is really gone is replaced when it is deleted" in words
        world = settled(world)
        for slot in lost:
            world = with_pod(world, slot, leaving=True, ends_by=NOW + MINUTE)
        made = [each.name.rsplit("-", 1)[0] for each in of_type(decided(world), CreatePod)]
        assert made == ["tiny-0-s0", "tiny-0-s1", "tiny-0-s2"]

    def test_keeps_the_place_of_a_stage_whose_next_pod_was_made_before_and_that_pod(self) -> None:
        """Either of them may turn out to be the one that works."""

        def both(world: World) -> World:
            following = replace(pod_in(world, PLACE), name="next", uid="next", created=NOW, node="node-free")
            return replace(world, pods=(*world.pods, replace(following, ip="10.0.9.1", ready_since=NOW)))

        def follows(world: World) -> tuple[str | None, list[str]]:
            """Who fills the place, and what is deleted."""
            at = NOW + PATIENCE
            stages = status_of(world, at).instances[0].stages
            return stages[1].pod, [each.name for each in of_type(decided(world, at), DeletePod)]

        first = pod_in(healthy_world(), PLACE).name
        assert follows(both(faulty("node-1"))) == ("next", [first])
        tripped = settled(faulty("node-0", "node-1", "node-2"))
        assert follows(both(tripped)) == (first, [])
        assert follows(with_nodes(both(tripped))) == (first, []), "nothing speaks against the first one any more"
        assert follows(with_nodes(both(healthy_world()))) == (first, ["next"])

    def test_starts_no_roll_out(self) -> None:
        world = settled(faulty("node-0", "node-1", "node-2"))
        assert status_of(with_spec(world, args=["--max-model-len=1024"])).drain is None

    def test_is_told_where_a_person_looks(self) -> None:
        world = faulty("node-0", "node-1", "node-2")
        status, reason, message = condition(world, "Stalled")
        assert (status, reason) == ("True", "BreakerTripped")
        assert "Stage 0.0, 0.1, 1.0, 1.1 should move, and is left where it is" in message
        assert condition(world, "Ready")[0] == "True"
        events = [each.reason for each in of_type(decided(world), Announce)]
        assert events.count("BreakerTripped") == 1
        assert "BreakerTripped" not in [each.reason for each in of_type(decided(settled(world)), Announce)]

    def test_that_holds_nothing_back_stalls_nothing(self) -> None:
        world = with_nodes(healthy_world())
        for slot in (stage(0, 0), stage(0, 1), stage(1, 1)):
            world = failed(world, slot=slot)
        breaker = status_of(world).breaker
        assert breaker is not None and breaker.tripped
        assert condition(world, "Stalled")[0] == "False"

    def test_resets_itself_after_a_quiet_time(self) -> None:
        world = settled(faulty("node-0", "node-1", "node-2"))
        assert status_of(world, NOW + QUIET - MINUTE).breaker is not None
        assert status_of(world, NOW + QUIET).breaker is None
        assert of_type(decided(world, NOW + QUIET), CreatePod)
        assert "BreakerReset" in [each.reason for each in of_type(decided(world, NOW + QUIET), Announce)]

    def test_does_not_reset_itself_while_more_fails(self) -> None:
        world = settled(faulty("node-0", "node-1", "node-2"))
        later = failed(world, NOW + QUIET - MINUTE)
        assert status_of(settled(later, NOW + QUIET), NOW + QUIET).breaker is not None

    def test_is_reset_by_the_annotation_and_trips_only_for_new_failures(self) -> None:
        world = settled(faulty("node-0", "node-1", "node-2"))
        reset = replace(world, object=replace(world.object, retry="today"))
        at = NOW + timedelta(seconds=10)
        assert of_type(decided(reset, at), CreatePod)
        after = settled(reset, at)
        breaker = status_of(after, at + timedelta(seconds=10)).breaker
        assert breaker is not None and not breaker.tripped
        assert status_of(after, at + AT_ONCE).breaker is None
        again = after
        for node in ("node-0", "node-1", "node-2"):
            again = with_condition(again, node, "SysLogsXIDError", since=at + timedelta(seconds=5))
        breaker = status_of(again, at + timedelta(seconds=10)).breaker
        assert breaker is not None and breaker.tripped


OBSERVE = {"recovery": {"mode": "Observe"}}


class TestObserve:
    def world(self) -> World:
        return settled(with_spec(with_nodes(healthy_world()), **OBSERVE))

    @staticmethod
    def touched(world: World) -> list[Any]:
        actions = decided(world)
        return [each for kind in (CreatePod, DeletePod, CreateToken, PublishPlan) for each in of_type(actions, kind)]

    def test_has_nothing_to_tell_while_all_is_well(self) -> None:
        assert decided(self.world()) == []
        assert condition(self.world(), "Stalled")[0] == "False"

    @pytest.mark.parametrize("mode", ["missing", "cordoned", "sick", "ended", "outdated"])
    def test_touches_nothing_and_tells_what_it_would_do(self, mode: str) -> None:
        world = self.world()
        name = pod(world.object, PLACE).name
        spoilt, words = {
            "missing": (without_pod(world, PLACE), f"make pod {name}"),
            "cordoned": (with_node(world, "node-2", unschedulable=True), "node node-2 is cordoned"),
            "sick": (with_pod(world, PLACE, ailments=(Ailment("nvidia.com/gpu", "G", certain=True),)), "is unhealthy"),
            "ended": (with_pod(world, PLACE, leaving=True, ended=True), f"delete pod {name}: stage 0.1 has ended"),
            "outdated": (
                with_spec(world, args=["--max-model-len=64"], **OBSERVE),
                "let instance 0 finish its requests, and then change its pods (RollOut)",
            ),
        }[mode]
        assert [each for each in self.touched(spoilt) if not isinstance(each, PublishPlan)] == []
        assert any(words in each for each in status_of(spoilt).would_do)
        status, reason, message = condition(spoilt, "Progressing")
        assert (status, reason) == ("False", "ObserveOnly")
        assert words in message
        told = [each.note for each in of_type(decided(spoilt), Announce) if each.reason == "WouldAct"]
        assert len(told) == len(status_of(spoilt).would_do)
        assert not [each for each in of_type(decided(settled(spoilt)), Announce) if each.reason == "WouldAct"]

    def test_asks_no_engine_to_move(self) -> None:
        world = with_pod(
            with_node(self.world(), "node-2", unschedulable=True),
            PLACE,
            ailments=(Ailment("nvidia.com/gpu", "G", certain=True),),
        )
        assert of_type(decided(world), PublishPlan) == []

    def test_keeps_routes_and_status_true(self) -> None:
        world = silent(self.world(), 0)
        assert len(of_type(decided(world), ApplyEndpoints)) == 1
        assert status_of(world).ready == "1/2"

    def test_makes_nothing_for_a_new_object(self) -> None:
        world = new_world(**OBSERVE)
        assert self.touched(world) == []
        assert "make Secret tiny-token" in status_of(world).would_do

    def test_acts_when_it_may_again(self) -> None:
        world = settled(without_pod(self.world(), PLACE))
        acting = with_spec(world)
        assert len(of_type(decided(acting), CreatePod)) == 1
        assert status_of(acting).would_do == ()
