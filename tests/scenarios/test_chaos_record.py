"""What a line says of a run on a cluster: whatever a client did not get as it should have is in it."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from resilientllm_cli.chaos.leaks import Leaks
from resilientllm_cli.chaos.line import Line
from resilientllm_cli.comparison import Tokens

from e2e.chaos.kinds import KINDS
from e2e.chaos.record import After, Record, line, timeline
from e2e.scenarios.fault import Fault
from e2e.scenarios.ground import Ground
from e2e.scenarios.look import parse_look
from e2e.scenarios.scenario import Scenario
from e2e.scenarios.verdict import Verdict
from tests.scenarios.test_look import START, items, recovery

GOOD = Verdict(
    streams=8,
    met=2,
    without_token=0,
    failed_explicitly=0,
    failed_otherwise=0,
    tokens=Tokens(delivered=960),
    problems=(),
    worst_stall_seconds=3.0,
    stalls_seconds=(0.4, 0.2),
)


def scenario(*recoveries: dict[str, Any], verdict: Verdict | None = GOOD, faults: int = 1) -> Scenario:
    seen = items()
    made = Scenario(Ground(Path()), "chaos/x", parse_look(seen, "tiny", 0.0))
    made.load_at = START
    for number in range(faults):
        made.did(Fault(f"fault {number}", START + timedelta(seconds=10 * number), 10.0 * number, "seen"))
    seen[0]["status"]["recoveries"] = list(recoveries)
    made.looks.append(parse_look(seen, "tiny", 1.0))
    made.verdict = verdict
    return made


def told(kind: str, of: Scenario, *problems: str) -> Any:
    return line(of, KINDS[kind], 7, of.before.stages[0], 42.0, problems)


def test_a_good_run_has_no_problem() -> None:
    good = told("node-killed", scenario(recovery("Borrow", 0, 1.5), recovery("SwapBack", 0, 40.0)))

    assert good.problems == ()
    assert (good.fault, good.shape, good.seed, good.victim) == ("node-killed", "2x2", 7, "0.0")
    assert good.landed == {"fault 0": "seen"}
    assert (good.detection_seconds, good.stall_seconds, good.stalls_seconds) == (1.5, 0.4, (0.4, 0.2))
    assert good.whole_after_seconds == 42.0


def test_detection_counts_from_the_fault_that_struck_the_stage() -> None:
    late = told("operator-dead", scenario(recovery("Borrow", 0, 10.25), faults=2))
    assert late.detection_seconds == 0.25


def test_a_fault_that_did_not_strike_the_stage_did_not_land() -> None:
    assert "the fault did not land" in told("operator-dead", scenario(faults=1)).problems
    assert "the fault did not land" in told("node-killed", scenario(faults=0, verdict=None)).problems


def test_a_run_that_met_nobody_or_compared_nothing_is_a_problem() -> None:
    nobody = replace(GOOD, met=0, stalls_seconds=())
    assert told("pod-deleted", scenario(verdict=nobody)).problems == ("no stream was met",)
    assert told("pod-deleted", scenario(verdict=None)).problems == ("nothing was compared",)


def test_what_clients_lost_is_counted_and_told() -> None:
    bad = replace(GOOD, tokens=Tokens(10, lost=3, duplicated=2, changed=1), problems=("broke",), failed_otherwise=1)
    of = told("pod-deleted", scenario(verdict=bad), "did not become whole")
    assert (of.lost, of.duplicated, of.changed, of.failed_otherwise) == (3, 2, 1, 1)
    assert of.problems == ("did not become whole", "broke")


@pytest.mark.parametrize(
    ("kind", "recoveries", "problem"),
    [
        ("kubelet-dead", [("Borrow", 0, 1.0)], "Borrow of 0.0 without reason: none given"),
        ("pod-deleted", [("Borrow", 0, 1.0)], "Borrow of 0.0 without reason: none given"),
        ("node-killed", [("Borrow", 0, 5.0), ("Borrow", 1, 6.0)], "Borrow of 1.0 without reason: none given"),
        ("node-killed", [("Borrow", 0, 5.0), ("Move", 1, 6.0)], "Move of 1.0 without reason: none given"),
        ("node-killed", [("Borrow", 0, -1.0)], "Borrow of 0.0 without reason before the fault: none given"),
    ],
)
def test_places_may_change_hands_only_as_the_fault_explains(
    kind: str, recoveries: list[tuple[str, int, float]], problem: str
) -> None:
    made = scenario(*(recovery(*each) for each in recoveries))
    made.load_at = START - timedelta(seconds=5)
    assert told(kind, made).problems == (problem,)


def test_a_stage_may_not_be_suspected_before_it_was_struck() -> None:
    early = told("operator-dead", scenario(recovery("Borrow", 0, 4.0), faults=2))
    assert early.problems == ("Borrow of 0.0 without reason before the fault: none given",)


def test_what_was_before_the_streams_is_no_problem_and_no_detection() -> None:
    made = scenario(recovery("Borrow", 0, -9.0), recovery("SwapBack", 0, -7.0))
    made.load_at = START - timedelta(seconds=5)
    assert (told("kubelet-dead", made).problems, told("node-killed", made).detection_seconds) == ((), None)


def test_only_the_suspicion_of_the_victim_is_its_detection() -> None:
    assert (
        told("node-killed", scenario(recovery("Borrow", 1, 0.5), recovery("Borrow", 0, 4.5))).detection_seconds == 4.5
    )


def test_a_stage_that_was_to_go_on_must_be_the_same_afterwards() -> None:
    made = scenario()
    seen = items()
    next(each for each in seen if each["kind"] == "Pod")["metadata"]["uid"] = "another"
    made.looks.append(parse_look(seen, "tiny", 2.0))
    assert told("kubelet-dead", made).problems == ("pods were replaced or started again",)


def test_a_stream_that_broke_before_the_fault_is_a_problem() -> None:
    early = replace(GOOD, early=("service, round 0, prompt 0: broke",))
    assert told("node-killed", scenario(verdict=early)).problems == (
        "before the fault: service, round 0, prompt 0: broke",
    )


def test_a_leak_is_a_problem_and_what_pods_hold_is_kept() -> None:
    of = scenario()
    none = Leaks(processes=0, descriptors=0, resident_bytes=0, connections=0, shared_memory=0, kv_in_use=0.0)
    held = {"engine 0": {"life": 12, "descriptors": 90, "resident_bytes": 1 << 30}}

    def after(leaks: Leaks) -> Line:
        return line(of, KINDS["kubelet-dead"], 7, of.before.stages[0], 42.0, (), After("scenes-0", leaks, held))

    assert after(none).problems == ()
    assert (after(none).world, after(none).held) == ("scenes-0", held)
    assert after(replace(none, kv_in_use=0.01)).problems == ("leaks kv_in_use: 0.01",)


def test_lines_are_appended_and_a_timeline_is_a_file_of_its_own(tmp_path: Path) -> None:
    of = scenario(recovery("Borrow", 0, 1.5), faults=2)
    for seed in (1, 2):
        made = line(of, KINDS["node-killed"], seed, of.before.stages[0], 42.0, ())
        Record(made, timeline(of)).write(tmp_path / "build" / "chaos.jsonl", tmp_path / "chaos")

    assert len((tmp_path / "build" / "chaos.jsonl").read_text().splitlines()) == 2
    document = json.loads((tmp_path / "chaos" / "node-killed-2x2-2.json").read_text())
    assert document["timeline"]["faults"] == [0.0, 10.0]
    assert document["timeline"]["recoveries"][0]["detected"] == 1.5
    assert "phases_ms" in document["timeline"]["recoveries"][0]
