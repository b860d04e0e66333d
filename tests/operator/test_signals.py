"""What follows for a stage from what its node, its devices and its pod say."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from resilientllm_api.crd import NodeAction, RecoveryPolicy, StragglerPolicy
from resilientllm_api.engine_state import Slowness
from resilientllm_operator.signals import NOT_READY_PATIENCE, Signal, condition_rules, signals_of, unfit_nodes
from resilientllm_operator.world import Ailment, NodeCondition, Taint, Toleration, World

from tests.operator.builders import (
    NOW,
    borrowed,
    engine,
    engine_state,
    healthy_world,
    pod,
    settled,
    silent,
    stage,
    with_condition,
    with_engine,
    with_node,
    with_nodes,
    with_pod,
    with_spec,
    without_node,
)

MOVE, BORROW, WARN = NodeAction.MOVE, NodeAction.BORROW, NodeAction.WARN
NOT_READY = {"conditions": {"Ready": NodeCondition("Unknown", reason="NodeStatusUnknown")}}


def not_ready(since: datetime) -> dict[str, Any]:
    return {"conditions": {"Ready": NodeCondition("Unknown", since=since)}}


def said(world: World, instance: int = 0, number: int = 1) -> Signal | None:
    """Of the stage's pod; by default that of 0.1, which is on node-1."""
    return signals_of(world, {}, NOW).get(pod(world.object, stage(instance, number)).uid)


def of_node(**changes: Any) -> Signal | None:
    return said(with_node(healthy_world(), "node-1", **changes))


def test_nothing_is_said_of_what_is_well() -> None:
    assert signals_of(with_nodes(healthy_world()), {}, NOW) == {}


def test_nothing_follows_where_nodes_cannot_be_seen() -> None:
    assert signals_of(healthy_world(), {}, NOW) == {}


@pytest.mark.parametrize(
    ("changes", "action", "words"),
    [
        ({"unschedulable": True}, MOVE, "node node-1 is cordoned"),
        ({"deleting": True}, MOVE, "node node-1 is being deleted"),
        (NOT_READY, MOVE, "node node-1 is not Ready (NodeStatusUnknown)"),
        ({"conditions": {"Ready": NodeCondition("False")}}, MOVE, "node node-1 is not Ready"),
        ({"taints": (Taint("gpu", "NoExecute", "broken"),)}, MOVE, "the taint gpu=broken:NoExecute"),
        ({"taints": (Taint("gpu", "NoSchedule"),)}, MOVE, "the taint gpu:NoSchedule"),
        ({"taints": (Taint("node.kubernetes.io/disk-pressure", "NoSchedule"),)}, WARN, "disk-pressure"),
        ({"taints": (Taint("node.kubernetes.io/out-of-service", "NoExecute", "nodeshutdown"),)}, BORROW, "out-of-serv"),
    ],
)
def test_of_its_node(changes: dict[str, Any], action: NodeAction, words: str) -> None:
    signal = of_node(**changes)
    assert signal is not None and signal.action is action
    assert words in signal.reason


@pytest.mark.parametrize(
    "taint",
    [
        Taint("gpu", "PreferNoSchedule"),
        Taint("node.kubernetes.io/unschedulable", "NoSchedule"),
        Taint("node.kubernetes.io/unreachable", "NoExecute"),
    ],
)
def test_of_these_taints_nothing_follows(taint: Taint) -> None:
    assert of_node(taints=(taint,)) is None


@pytest.mark.parametrize(
    ("toleration", "tolerated"),
    [
        (Toleration(), True),
        (Toleration("gpu", "a", "NoSchedule"), True),
        (Toleration("gpu"), True),
        (Toleration("gpu", "b"), False),
        (Toleration("gpu", None, "NoExecute"), False),
        (Toleration("other"), False),
        (Toleration("gpu", seconds=300), False),
    ],
)
def test_a_taint_that_the_pod_tolerates_says_nothing(toleration: Toleration, tolerated: bool) -> None:
    world = with_pod(healthy_world(), stage(0, 1), tolerations=(toleration,))
    tainted = with_node(world, "node-1", taints=(Taint("gpu", "NoSchedule", "a"),))
    assert (said(tainted) is None) is tolerated


class TestANodeThatIsNotReady:
    def test_may_hold_a_stage_that_works(self) -> None:
        signal = of_node(**not_ready(NOW - NOT_READY_PATIENCE))
        assert signal is not None and signal.action is MOVE

    def test_may_be_called_so_by_mistake_as_long_as_its_stage_is_heard(self) -> None:
        signal = of_node(**not_ready(NOW))
        assert signal is not None and signal.action is WARN
        lost = with_node(with_engine(healthy_world(), 0, borrowed(0, 1, donor=1)), "node-1", **not_ready(NOW))
        signal = said(lost)
        assert signal is not None and signal.action is BORROW

    def test_may_be_called_so_by_mistake_while_its_stage_loads_and_cannot_be_heard(self) -> None:
        lost = with_node(with_engine(healthy_world(), 0, borrowed(0, 1, donor=1)), "node-1", **not_ready(NOW))
        signal = said(with_pod(lost, stage(0, 1), ready=False, loads=True))
        assert signal is not None and signal.action is WARN

    def test_is_no_loss_before_the_engine_was_asked(self) -> None:
        """An operator that has just begun knows of no engine what it says."""
        signal = said(replace(with_node(healthy_world(), "node-1", **not_ready(NOW)), engines={}))
        assert signal is not None and signal.action is WARN

    def test_is_not_better_again_because_another_operator_begins(self) -> None:
        lost = settled(with_node(with_engine(healthy_world(), 0, borrowed(0, 1, donor=1)), "node-1", **not_ready(NOW)))
        signal = said(replace(lost, engines={}))
        assert signal is not None and signal.action is BORROW

    def test_holds_none_that_its_engine_does_not_hear(self) -> None:
        lost = with_node(with_engine(healthy_world(), 0, borrowed(0, 1, donor=1)), "node-1", **NOT_READY)
        signal = said(lost)
        assert signal is not None and signal.action is BORROW

    def test_is_believed_when_the_engine_is_silent_too(self) -> None:
        signal = said(with_node(silent(healthy_world(), 0), "node-1", **NOT_READY))
        assert signal is not None and signal.action is BORROW

    def test_that_does_not_exist_any_more_holds_none(self) -> None:
        signal = said(without_node(healthy_world(), "node-1"))
        assert signal is not None and signal.action is BORROW
        assert "node-1 does not exist any more" in signal.reason

    def test_that_is_not_known_yet_says_nothing_of_a_new_pod(self) -> None:
        world = with_pod(healthy_world(), stage(0, 1), ip=None, ready=False)
        assert said(without_node(world, "node-1")) is None


class TestConditions:
    @pytest.mark.parametrize(
        ("kind", "action"),
        [
            ("GpuMemWatch", MOVE),
            ("SysLogsXIDError", MOVE),
            ("SysLogsGPUFallenOff", BORROW),
            ("GpuDcgmConnectivityFailure", WARN),
            ("DiskPressure", None),
        ],
    )
    def test_of_nvsentinel_are_known(self, kind: str, action: NodeAction | None) -> None:
        signal = said(with_condition(healthy_world(), "node-1", kind))
        assert (signal.action if signal else None) is action

    def test_that_are_not_true_say_nothing(self) -> None:
        assert said(with_condition(healthy_world(), "node-1", "GpuMemWatch", "False")) is None

    def test_are_told_in_their_own_words_and_not_too_many(self) -> None:
        text = "[79] GPU has\nfallen off the bus. " + "RecommendedAction:RESTART_BM " * 20
        signal = said(with_condition(healthy_world(), "node-1", "GpuMemWatch", message=text))
        assert signal is not None
        assert "node node-1 has GpuMemWatch=True: [79] GPU has fallen off the bus." in signal.reason
        assert len(signal.reason) <= 200

    @pytest.mark.parametrize(
        ("rule", "kind", "status", "action"),
        [
            ({"type": "Ours", "action": "Borrow"}, "Ours", "True", BORROW),
            ({"type": "Ours", "status": "False", "action": "Move"}, "Ours", "False", MOVE),
            ({"type": "Ours", "status": "False", "action": "Move"}, "Ours", "True", None),
            ({"type": "GpuMemWatch", "action": "Ignore"}, "GpuMemWatch", "True", None),
            ({"type": "GpuMemWatch", "action": "Borrow"}, "GpuMemWatch", "True", BORROW),
            ({"type": "Ours", "action": "Move"}, "GpuMemWatch", "True", MOVE),
        ],
    )
    def test_may_be_given_another_meaning(
        self, rule: dict[str, str], kind: str, status: str, action: NodeAction | None
    ) -> None:
        world = with_spec(healthy_world(), recovery={"nodeConditions": [rule]})
        signal = said(with_condition(world, "node-1", kind, status))
        assert (signal.action if signal else None) is action

    def test_that_are_built_in_are_those_that_the_schema_tells_of(self) -> None:
        field = type(healthy_world().object.spec.recovery).model_fields["node_conditions"]
        described = " ".join((field.description or "").split())
        rules = {kind: action for (kind, _), action in condition_rules(healthy_world()).items()}
        for action in (BORROW, WARN, MOVE):
            _, _, after = described.partition(f"{action} for ")
            told = after.partition(";")[0].partition(". ")[0].replace(" and ", ", ").split(", ")
            assert set(told) == {kind for kind, known in rules.items() if known is action}


class TestThePodItself:
    def test_that_was_told_to_end_moves(self) -> None:
        signal = said(with_pod(healthy_world(), stage(0, 1), leaving=True))
        assert signal is not None and signal.action is MOVE

    def test_that_has_ended_is_lost(self) -> None:
        signal = said(with_pod(healthy_world(), stage(0, 1), leaving=True, ended=True))
        assert signal is not None and signal.action is BORROW

    def test_with_a_sick_device_is_not_to_be_trusted(self) -> None:
        sick = Ailment("nvidia.com/gpu", "GPU-2", certain=True, message="ECC errors")
        signal = said(with_pod(healthy_world(), stage(0, 1), ailments=(sick,)))
        assert signal == Signal(BORROW, "device GPU-2 (nvidia.com/gpu) on node node-1 is unhealthy: ECC errors")

    def test_with_a_device_of_which_nobody_knows_is_warned_of(self) -> None:
        unknown = Ailment("nvidia.com/gpu", "GPU-2", certain=False)
        signal = said(with_pod(healthy_world(), stage(0, 1), ailments=(unknown,)))
        assert signal is not None and signal.action is WARN

    def test_that_says_that_it_ends_is_warned_of(self) -> None:
        state = engine_state(0)
        stages = tuple(each.model_copy(update={"own_leaving": each.stage == 1}) for each in state.stages)
        signal = said(with_engine(healthy_world(), 0, state.model_copy(update={"stages": stages})))
        assert signal is not None and signal.action is WARN

    def test_on_a_node_that_is_avoided_moves(self) -> None:
        world = with_nodes(healthy_world())
        assert signals_of(world, {"node-2": "3 failures"}, NOW) == {
            pod(world.object, stage(1, 1)).uid: Signal(MOVE, "node node-2 is avoided: 3 failures")
        }

    def test_the_strongest_counts_with_all_its_reasons(self) -> None:
        world = with_node(with_condition(healthy_world(), "node-1", "GpuMemWatch"), "node-1", unschedulable=True)
        assert said(world) == Signal(MOVE, "node node-1 is cordoned; node node-1 has GpuMemWatch=True")
        sick = Ailment("nvidia.com/gpu", "GPU-2", certain=True)
        signal = said(with_pod(world, stage(0, 1), ailments=(sick,)))
        assert signal is not None and signal.action is BORROW and "cordoned" not in signal.reason


class TestAnEngine:
    @staticmethod
    def said(world: World) -> Signal | None:
        return signals_of(world, {}, NOW).get(pod(world.object, engine(0)).uid)

    def test_does_not_move_and_is_warned_of(self) -> None:
        signal = self.said(with_node(healthy_world(), "node-0", unschedulable=True))
        assert signal is not None and signal.action is WARN

    def test_on_a_lost_node_that_does_not_answer_is_lost(self) -> None:
        signal = self.said(with_node(silent(healthy_world(), 0), "node-0", **NOT_READY))
        assert signal is not None and signal.action is BORROW

    def test_that_answers_is_not(self) -> None:
        signal = self.said(with_node(healthy_world(), "node-0", **NOT_READY))
        assert signal is not None and signal.action is WARN

    def test_has_no_device(self) -> None:
        assert self.said(with_condition(healthy_world(), "node-0", "GpuMemWatch")) is None


def test_new_stages_keep_off_nodes_that_stages_would_have_to_leave() -> None:
    world = with_condition(with_nodes(healthy_world(), "node-bad", "node-worse"), "node-bad", "SysLogsXIDError")
    sick = Ailment("nvidia.com/gpu", "GPU-2", certain=True)
    world = with_node(with_pod(world, stage(0, 0), ailments=(sick,)), "node-free", deleting=True)
    assert unfit_nodes(world, {"node-worse": "3 failures"}) == {"node-0", "node-bad", "node-free", "node-worse"}


def test_a_pod_that_ends_says_nothing_against_its_node() -> None:
    assert unfit_nodes(with_pod(with_nodes(healthy_world()), stage(0, 0), leaving=True), {}) == frozenset()


class TestAStageThatIsSlow:
    SLOW = Slowness(history=2.2, twins=1.9)

    def world(self, **spec: Any) -> World:
        """The engine says so of 0.1, and speaks of the pod that is in its place."""
        world = settled(healthy_world(**spec))
        state = engine_state(0)
        stages = (state.stages[0], state.stages[1].model_copy(update={"own_slow": self.SLOW}))
        assert world.object.status.plan is not None
        version = world.object.status.plan.version
        return with_engine(world, 0, state.model_copy(update={"stages": stages, "plan_version": version}))

    def test_is_told_with_its_figures(self) -> None:
        signal = said(self.world())
        assert signal is not None and signal.action is WARN
        assert "its steps take 2.2 times as long as before, and 1.9 times its twins'" in signal.reason

    def test_is_left_if_that_is_the_policy_and_nothing_new_is_placed_there(self) -> None:
        world = self.world(recovery=RecoveryPolicy(stragglers=StragglerPolicy.MOVE))
        signal = said(world)
        assert signal is not None and signal.action is MOVE
        assert "node-1" in unfit_nodes(world, {})

    def test_is_not_mistaken_for_the_pod_that_takes_its_place(self) -> None:
        world = self.world()
        assert said(with_pod(world, stage(0, 1), name="another")) is None

    def test_is_not_told_by_an_engine_that_has_an_older_plan(self) -> None:
        world = self.world()
        state = world.engine(world.engine_pod(0)).state
        assert state is not None
        assert said(with_engine(world, 0, state.model_copy(update={"plan_version": state.plan_version - 1}))) is None
