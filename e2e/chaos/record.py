"""What is kept of a run: a line, as `resilientllm chaos` has it, and tokens of each stream over time, for a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resilientllm_api.crd import RecoveryStatus
from resilientllm_api.engine_state import RecoveryKind
from resilientllm_cli.chaos.leaks import Leaks
from resilientllm_cli.chaos.line import Line

from e2e.chaos.kinds import ClusterKind
from e2e.demo.observation import Pod
from e2e.scenarios.look import Look
from e2e.scenarios.scenario import Scenario

SHAPE = "2x2"


@dataclass(frozen=True)
class After:
    """What there is when everything is whole again, and the streams are over."""

    world: str
    """Runs with the same one had the same pods, but for those that were lost."""
    leaks: Leaks
    held: Mapping[str, dict[str, int]]


@dataclass(frozen=True)
class Record:
    line: Line
    timeline: dict[str, Any]

    def write(self, lines: Path, directory: Path) -> None:
        """The line is appended, the timeline has a file of its own."""
        lines.parent.mkdir(parents=True, exist_ok=True)
        with lines.open("a") as file:
            file.write(self.line.to_json() + "\n")
        directory.mkdir(parents=True, exist_ok=True)
        document = {"line": json.loads(self.line.to_json()), "timeline": self.timeline}
        name = f"{self.line.fault}-{self.line.shape}-{self.line.seed}.json"
        (directory / name).write_text(json.dumps(document))


def line(
    scenario: Scenario,
    kind: ClusterKind,
    seed: int,
    victim: Pod,
    whole: float | None,
    problems: Sequence[str],
    after: After | None = None,
) -> Line:
    """``whole``: seconds from the first fault until everything was back."""
    found, verdict = list(problems), scenario.verdict
    if len(scenario.faults) <= kind.strikes:
        found.append("the fault did not land")
    if verdict is None:
        return Line(kind.name, SHAPE, seed, _landed(scenario), problems=(*found, "nothing was compared"))
    found += [f"before the fault: {words}" for words in verdict.early]
    found += verdict.problems
    if not verdict.met:
        found.append("no stream was met")
    found += _changes_without_reason(scenario, kind, victim)
    if after is not None:
        found += after.leaks.problems()
    return Line(
        fault=kind.name,
        shape=SHAPE,
        seed=seed,
        landed=_landed(scenario),
        victim=victim.place.removeprefix("stage "),
        prompts_without_token=verdict.without_token,
        streams_met=verdict.met,
        lost=verdict.tokens.lost,
        duplicated=verdict.tokens.duplicated,
        changed=verdict.tokens.changed,
        failed_explicitly=verdict.failed_explicitly,
        failed_otherwise=verdict.failed_otherwise,
        detection_seconds=_detection_seconds(scenario, kind, victim),
        stall_seconds=max(verdict.stalls_seconds, default=None),
        stalls_seconds=verdict.stalls_seconds,
        recoveries=tuple(scenario.recoveries()),
        whole_after_seconds=whole,
        leaks=asdict(after.leaks) if after is not None else {},
        world=after.world if after is not None else "",
        held=dict(after.held) if after is not None else {},
        problems=tuple(found),
    )


def timeline(scenario: Scenario) -> dict[str, Any]:
    """Of the streams that the first fault met; in seconds since it."""
    if not scenario.faults:
        return {"faults": [], "streams": [], "recoveries": []}
    zero = scenario.first_fault.at_seconds
    return {
        "faults": [round(each.at_seconds - zero, 3) for each in scenario.faults],
        "streams": [
            {
                "of": each.target,
                "index": each.stream.index,
                "arrivals": [round(at - zero, 4) for at in each.stream.arrivals_seconds],
            }
            for each in scenario.sent
            if each.asked_seconds < zero and (each.ended_seconds is None or each.ended_seconds > zero)
        ],
        "recoveries": [{**each, "detected": each["after_seconds"]} for each in scenario.recoveries()],
    }


def _landed(scenario: Scenario) -> dict[str, Any]:
    return {each.what: each.evidence for each in scenario.faults}


def _detection_seconds(scenario: Scenario, kind: ClusterKind, victim: Pod) -> float | None:
    """From the fault that struck the stage to the engine's suspicion of it."""
    if len(scenario.faults) <= kind.strikes:
        return None
    since = scenario.faults[kind.strikes].at
    suspicions = [
        (each.detected_at - since).total_seconds()
        for each in scenario.now.recoveries_since(since)
        if each.kind is RecoveryKind.BORROW and _is_of(each, victim)
    ]
    return round(min(suspicions), 4) if suspicions else None


def _changes_without_reason(scenario: Scenario, kind: ClusterKind, victim: Pod) -> Iterator[str]:
    """Of places that the fault does not explain: others than the victim's, or for another reason, or before it."""
    for each in scenario.now.recoveries_since(scenario.load_at):
        place = ", ".join(f"{each.instance}.{stage}" for stage in each.stages)
        early = len(scenario.faults) <= kind.strikes or each.detected_at < scenario.faults[kind.strikes].at
        # What has gone comes home.
        explained = each.kind in (kind.change, RecoveryKind.SWAP_BACK) and kind.change is not None
        if early or not explained or not _is_of(each, victim):
            yield f"{each.kind} of {place} without reason{' before the fault' * early}: {each.reason or 'none given'}"
    # A stage that goes on where it is keeps its pod and its process.
    if kind.change is None and _lives(scenario.before) != _lives(scenario.now):
        yield "pods were replaced or started again"


def _lives(look: Look) -> dict[str, int]:
    """Restarts of each pod."""
    return {pod.uid: pod.restarts for pod in look.pods}


def _is_of(recovery: RecoveryStatus, victim: Pod) -> bool:
    return (recovery.instance, recovery.stages) == (victim.instance, (victim.stage,))
