"""Half an hour of load, hogs, collections and prefills in simulated time: nobody is suspected, and what stops is found.

How late heartbeats and ticks come is drawn from a run of ``bench.suspicions``, in which two processes took what CPU
they got on a machine of two cores, and every stage was held up by the collector again and again.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from resilientllm_api.engine_state import LossReason
from resilientllm_api.plan import Limits

from tests.worker.engine.simulated import Pipeline

MEASURED = json.loads(
    (Path(__file__).parents[3] / "bench" / "results" / "2026-11-21-suspicions.json").read_text(encoding="utf-8")
)
MEASURED_GAPS: list[float] = [gap for stage in MEASURED["gaps_seconds"] for gap in stage]
PAUSE_SECONDS = 0.7
GAPS = MEASURED_GAPS + [PAUSE_SECONDS] * (len(MEASURED_GAPS) // 70)
"""And besides, every seven seconds all threads of a stage stand still for this long, as for a large collection."""
TICKS: list[float] = MEASURED["observer_ticks_seconds"]
ON_TIME = [Limits().heartbeat_interval_seconds]
LONGEST_DECODE_SECONDS = 0.2
WARM_SECONDS = 60.0
"""Long enough for every size of steps to be known."""
FAULTS = {
    "beat": LossReason.SILENCE,
    "command": LossReason.UNREACHABLE,
    "link": LossReason.NEIGHBOUR,
    "step": LossReason.HANG,
}


@pytest.mark.parametrize("seed", range(2))
def test_nobody_is_suspected_in_half_an_hour(seed: int) -> None:
    pipeline = Pipeline(seed, GAPS, TICKS)
    assert pipeline.run(1800.0) == []
    assert pipeline.now > 1799.0
    assert min(place.steps_done for place in pipeline.places) > 3000, "it stood still"


@pytest.mark.parametrize("gaps", [ON_TIME, GAPS], ids=["on time", "as measured"])
@pytest.mark.parametrize(
    ("fault", "place"), [(fault, place) for fault in FAULTS for place in range(3) if (fault, place) != ("link", 0)]
)
def test_what_stops_is_found_for_what_it_is(fault: str, place: int, gaps: list[float]) -> None:
    pipeline = Pipeline(7, gaps, ON_TIME, prefills=0.02)
    assert pipeline.run(WARM_SECONDS) == []
    pipeline.broken.add((place, fault))
    (alarm,) = pipeline.run(60.0)
    assert (alarm.place, alarm.reason) == (place, FAULTS[fault])


@pytest.mark.parametrize("seed", range(5))
def test_a_stage_that_falls_silent_is_lost_within_a_second(seed: int) -> None:
    """Where heartbeats and ticks are on time."""
    pipeline = Pipeline(seed, ON_TIME, ON_TIME)
    assert pipeline.run(20.0 + seed / 31) == []
    stopped = pipeline.now
    pipeline.broken |= {(1, "beat"), (1, "command"), (1, "link"), (1, "step")}
    (alarm,) = pipeline.run(10.0)
    assert (alarm.place, alarm.reason) == (1, LossReason.SILENCE)
    assert alarm.at - stopped <= 1.0


@pytest.mark.parametrize("seed", range(5))
def test_a_link_that_is_cut_is_found_within_a_second_of_the_next_step(seed: int) -> None:
    """Even if it takes packets for as long as TCP sends any without an acknowledgement, 0.2 s."""
    pipeline = Pipeline(seed, ON_TIME, ON_TIME, prefills=0.0)
    assert pipeline.run(20.0 + seed / 31) == []
    stopped = pipeline.now
    pipeline.broken.add((1, "link"))
    (alarm,) = pipeline.run(10.0)
    assert (alarm.place, alarm.reason) == (1, LossReason.NEIGHBOUR)
    assert alarm.at - stopped <= 0.8 + LONGEST_DECODE_SECONDS
