"""The operator's metrics: each recovery counted once, whoever acts, and nothing told of what nobody looks after."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry
from resilientllm_api.crd import FailureCause, FailureStatus, RecoveryStatus, ResilientLLMStatus
from resilientllm_api.engine_state import RecoveryKind
from resilientllm_operator import telemetry
from resilientllm_operator.actions import Announce
from resilientllm_operator.object_metrics import ObjectMetrics
from resilientllm_operator.permit import NotPermitted
from resilientllm_operator.recovery_metrics import RecoveryMetrics

from tests.operator.builders import NOW, borrowed, healthy_world, status_of, with_engine

OF = {"namespace": "default", "name": "tiny"}


class Counted:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = RecoveryMetrics(self.registry)

    def note(self, before: ResilientLLMStatus, after: ResilientLLMStatus) -> None:
        self.metrics.note("default", "tiny", before, after)

    def __call__(self, name: str, /, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"resilientllm_operator_{name}", labels)

    def labels(self, name: str) -> list[dict[str, str]]:
        """Of each series of this name."""
        samples = (sample for family in self.registry.collect() for sample in family.samples)
        return [sample.labels for sample in samples if sample.name == f"resilientllm_operator_{name}"]


def a_recovery(**changes: Any) -> RecoveryStatus:
    given: dict[str, Any] = {
        "id": "a",
        "instance": 0,
        "kind": RecoveryKind.BORROW,
        "stages": (1,),
        "reason": "ConnectionReset",
        "detected_at": NOW,
        "resumed_at": NOW + timedelta(milliseconds=80),
        "phases": {"fence": 5.0, "stitch": 15.0, "resume": 60.0, "total": 80.0},
        "requests_affected": 3,
        "tokens_recomputed": 10,
        "tokens_kept": 90,
    }
    return RecoveryStatus(**{**given, **changes})


def a_status(*recoveries: RecoveryStatus, **more: Any) -> ResilientLLMStatus:
    return ResilientLLMStatus(recoveries=recoveries, **more)


def test_a_recovery_is_counted_with_the_status_that_names_it_first() -> None:
    counted, first = Counted(), a_status(a_recovery())
    counted.note(a_status(), first)
    counted.note(first, first)

    assert counted("recoveries_total", **OF, kind="Borrow", reason="ConnectionReset") == 1
    assert counted("recovery_seconds_sum", **OF, kind="Borrow") == 0.08
    assert counted("recovery_seconds_bucket", **OF, kind="Borrow", le="0.1") == 1
    assert counted("recovery_phase_seconds_sum", kind="Borrow", phase="stitch") == 0.015
    assert counted("requests_affected_total", **OF, kind="Borrow") == 3


def test_one_that_is_under_way_is_counted_when_it_is_over() -> None:
    counted, going = Counted(), a_status(a_recovery(resumed_at=None, phases={}))
    counted.note(a_status(), going)
    assert counted("recoveries_total", **OF, kind="Borrow", reason="ConnectionReset") is None
    counted.note(going, a_status(a_recovery()))
    assert counted("recoveries_total", **OF, kind="Borrow", reason="ConnectionReset") == 1


def test_what_has_not_happened_yet_is_counted_as_nothing() -> None:
    """An increase from no series to 1 is none to Prometheus."""
    counted = Counted()
    counted.metrics.begin("default", "tiny")

    assert counted("recoveries_total", **OF, kind="Borrow", reason="StepOverdue") == 0
    assert counted("recovery_seconds_count", **OF, kind="Borrow") == 0
    assert counted("failures_total", **OF, cause="NodeLost") == 0
    assert counted("recovery_phase_seconds_count", kind="Move", phase="flush") == 0


def test_tokens_that_are_counted_later_are_added() -> None:
    counted, first = Counted(), a_status(a_recovery())
    counted.note(a_status(), first)
    counted.note(first, a_status(a_recovery(tokens_recomputed=12, tokens_kept=120)))

    assert counted("tokens_total", **OF, fate="recomputed") == 12
    assert counted("tokens_total", **OF, fate="kept") == 120


def test_capacity_is_restored_when_the_own_stages_are_back() -> None:
    counted, first = Counted(), a_status(a_recovery())
    counted.note(a_status(), first)
    assert counted("restoration_seconds_count") == 0
    counted.note(first, a_status(a_recovery(restored_at=NOW + timedelta(seconds=20))))

    assert counted("restoration_seconds_sum") == 20.0


def test_failures_are_counted_by_their_cause() -> None:
    failure = FailureStatus(at=NOW, cause=FailureCause.EXITED, stage="0.1")
    counted, first = Counted(), a_status(failures=(failure,))
    counted.note(a_status(), first)
    counted.note(first, first)

    assert counted("failures_total", **OF, cause="Exited") == 1


def test_an_object_that_is_gone_leaves_no_series_behind() -> None:
    counted = Counted()
    counted.note(a_status(), a_status(a_recovery()))
    counted.metrics.forget("default", "tiny")

    left = {sample.name for family in counted.registry.collect() for sample in family.samples if sample.labels == OF}
    assert left == set()
    assert counted("recoveries_total", **OF, kind="Borrow", reason="ConnectionReset") is None


class TestAnObject:
    def setup_method(self) -> None:
        self.registry = CollectorRegistry()
        self.objects = ObjectMetrics()
        self.registry.register(self.objects)

    def __call__(self, name: str, /, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"resilientllm_{name}", {**OF, **labels})

    def test_that_is_well(self) -> None:
        self.objects.put("default", "tiny", 2, status_of(healthy_world()))

        assert (self("instances"), self("instances_serving")) == (2, 2)
        assert self("instances_phase", phase="Serving") == 2
        assert self("instances_phase", phase="Waiting") is None
        assert (self("stages_borrowed"), self("stages_not_kept")) == (0, 0)
        assert self("condition", type="Ready", status="True") == 1
        assert self("condition", type="Degraded", status="True") == 0
        assert self("condition_reason", type="Ready", reason="AllInstancesServing") == 1

    def test_with_a_donor_at_work(self) -> None:
        self.objects.put("default", "tiny", 2, status_of(with_engine(healthy_world(), 0, borrowed(0, 1, donor=1))))

        assert self("stages_borrowed") == 1
        assert self("instances_phase", phase="Degraded") == 1
        assert self("condition", type="Degraded", status="True") == 1

    def test_that_nobody_looks_after_is_not_told(self) -> None:
        self.objects.put("default", "tiny", 2, status_of(healthy_world()))
        self.objects.forget("default", "tiny")

        assert self("instances") is None


@pytest.mark.parametrize(
    ("error", "result"), [(None, "ok"), (NotPermitted("no lease"), "held"), (TimeoutError(), "error")]
)
def test_an_action_is_counted_by_what_came_of_it(error: Exception | None, result: str) -> None:
    before = telemetry.ACTIONS.labels("Announce", result)._value.get()
    try:
        with telemetry.acting(Announce("Moved", "for people")):
            if error is not None:
                raise error
    except (NotPermitted, TimeoutError) as raised:
        assert raised is error

    assert telemetry.ACTIONS.labels("Announce", result)._value.get() == before + 1


def test_every_phase_that_an_engine_tells_is_counted_from_the_beginning() -> None:
    counted = Counted()
    counted.note(a_status(), a_status(a_recovery(phases=dict.fromkeys(("wait", "rollBack", "total"), 80.0))))
    told = counted.labels("recovery_phase_seconds_count")

    assert {each["phase"] for each in told if each["kind"] == "Borrow"} == {
        *("wait", "fence", "stitch", "rollBack", "resume")
    }


@pytest.mark.parametrize("reason", ["Borrowed", "BreakerTripped"])
def test_a_transition_that_has_not_been_yet_is_counted_as_nothing(reason: str) -> None:
    name = "resilientllm_operator_transitions_total"
    assert REGISTRY.get_sample_value(name, {"reason": reason}) is not None
