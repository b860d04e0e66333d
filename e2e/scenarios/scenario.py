"""One scenario from its first look to its line in the ledger: what was done, what was seen, what clients noticed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from resilientllm_api.crd import ConditionType, RecoveryStatus

from e2e.cluster.errors import ClusterError, CommandFailed
from e2e.demo.observation import Pod, waits_for
from e2e.scenarios.fault import Fault
from e2e.scenarios.ground import LOOK_SECONDS, STREAMS_SECONDS, Ground
from e2e.scenarios.load import PAUSE_SECONDS, Load, Sent
from e2e.scenarios.look import Look
from e2e.scenarios.verdict import Verdict, judge, stall_between

MIDDLE_SECONDS = 60.0
TIMEOUT_SECONDS = 1500
"""Of a whole test: making the cluster, and making it anew, is part of it. Scenarios have bounds of their own."""


class Scenario:
    """``looks`` has everything that was seen of the cluster, from before the first fault on."""

    def __init__(self, ground: Ground, name: str, before: Look) -> None:
        self.ground = ground
        self.name = name
        self.looks = [before]
        self.faults: list[Fault] = []
        self.bound_seconds: float | None = None
        self.verdict: Verdict | None = None
        self.times: dict[str, float] = {}
        """Seconds from the first fault to each thing that was waited for."""
        self.load_at = datetime.now(UTC)
        """When streams began, or could have."""
        self._load: Load | None = None

    @property
    def before(self) -> Look:
        return self.looks[0]

    @property
    def now(self) -> Look:
        """The last look."""
        return self.looks[-1]

    @property
    def first_fault(self) -> Fault:
        return self.faults[0]

    def start_load(self, *, engines: Iterable[int] = (0, 1), pause_seconds: float = PAUSE_SECONDS) -> None:
        """Streams that all run when this returns, so that what follows meets them in the middle."""
        self.load_at = datetime.now(UTC)
        self._load = self.ground.load(engines=engines, pause_seconds=pause_seconds)
        self._load.reach_the_middle(MIDDLE_SECONDS)

    def meet_streams(self) -> None:
        """Returns when every stream is in the middle again."""
        assert self._load is not None
        self._load.reach_the_middle(MIDDLE_SECONDS)

    @property
    def sent(self) -> Sequence[Sent]:
        """All streams that were asked for."""
        return self._load.sent if self._load is not None else ()

    @property
    def streams_run(self) -> bool:
        assert self._load is not None
        return any(sent.in_the_middle for sent in self._load.sent)

    def did(self, fault: Fault) -> Fault:
        self.faults.append(fault)
        return fault

    def until(self, what: str, reached: Callable[[Look], bool], within_seconds: float) -> Look:
        """The first look that has reached it. ``within_seconds`` are counted from the last fault."""
        deadline = self.faults[-1].at_seconds + within_seconds
        while not reached(look := self.look()):
            if time.monotonic() > deadline:
                raise ClusterError(
                    expected=f"{what} within {within_seconds:g} s of: {self.faults[-1].what}",
                    found=waits_for(look.seen),
                    remedy=f"see build/e2e/{self.name}",
                )
            time.sleep(LOOK_SECONDS)
        self.times[what] = look.at_seconds - self.first_fault.at_seconds
        return look

    def until_whole(self, bound_seconds: float, *, moves: bool = True) -> Look:
        """Until what the faults took is made up for. The bound, that of the scenario, counts from the last fault.

        ``moves``: places change hands on the way. An object looks whole until somebody has noticed the fault.
        """
        self.bound_seconds = bound_seconds
        start = self.first_fault.at
        return self.until("whole", lambda look: look.whole and (not moves or look.home_since(start)), bound_seconds)

    def look(self) -> Look:
        look = self.ground.look()
        self.looks.append(look)
        return look

    def judge(self) -> Verdict:
        """Lets the streams end, and compares them with the undisturbed ones."""
        assert self._load is not None
        self._load.finish(STREAMS_SECONDS)
        self.verdict = judge(self._load.sent, self.ground.reference, self.first_fault.at_seconds)
        return self.verdict

    def close(self) -> None:
        if self._load is not None:
            self._load.cut()
            if self.verdict is None and self.faults:
                self.verdict = judge(self._load.sent, self.ground.reference, self.first_fault.at_seconds)

    def made_since(self, moment: Look) -> list[Pod]:
        """Pods that were seen at any later look and not before."""
        known = {pod.uid for pod in moment.seen.pods}
        later = [look for look in self.looks if look.at_seconds > moment.at_seconds]
        made = {pod.uid: pod for look in later for pod in look.seen.pods if pod.uid not in known}
        return list(made.values())

    def keep_evidence(self, why: str) -> None:
        try:
            self.ground.keep_evidence(self.name, why)
        except (ClusterError, OSError, CommandFailed) as error:
            why = f"{why}\n{error}"

    def line(self, outcome: str) -> dict[str, Any]:
        """For the ledger. Seconds are counted from the first fault."""
        verdict, start = self.verdict, self.first_fault.at if self.faults else None
        return {
            "scenario": self.name,
            "outcome": outcome,
            "bound_seconds": self.bound_seconds,
            "seconds": {what: round(seconds, 1) for what, seconds in (self.times | self._timeline()).items()},
            "faults": [
                {"what": each.what, "at": each.at.isoformat(), "evidence": each.evidence} for each in self.faults
            ],
            **(
                {
                    "streams": verdict.streams,
                    "streams_met": verdict.met,
                    "worst_stall_seconds": round(verdict.worst_stall_seconds, 3),
                    "tokens": verdict.tokens.delivered,
                    "lost": verdict.tokens.lost,
                    "duplicated": verdict.tokens.duplicated,
                    "changed": verdict.tokens.changed,
                    "problems": list(verdict.problems),
                }
                if verdict
                else {}
            ),
            "new_pods": self._new_pods(start) if start else [],
            "recoveries": self.recoveries(),
            "events": [
                f"{event.reason}: {event.note}"
                for event in self.now.seen.events
                if event.uid not in {each.uid for each in self.before.seen.events}
            ],
            "cluster_remade": self.ground.remade,
        }

    def _stall_of(self, recovery: RecoveryStatus) -> float | None:
        """The longest that a client waited on account of one re-stitch: not for want of a core, a moment later."""
        if self._load is None or recovery.resumed_at is None:
            return None
        start, zero = self.first_fault, self.first_fault.at_seconds
        since, until = ((at - start.at).total_seconds() + zero for at in (recovery.detected_at, recovery.resumed_at))
        return round(stall_between(self._load.sent, since, until), 3)

    def _timeline(self) -> dict[str, float]:
        """What can be told of every scenario."""
        if not self.faults:
            return {}
        seen: dict[str, Callable[[Look], bool]] = {
            "node not ready": lambda look: any(node.ready != "True" for node in look.nodes.values()),
            "not available": lambda look: not look.seen.is_true(ConditionType.AVAILABLE),
        }
        start = self.first_fault.at_seconds
        first = {what: next((look for look in self.looks[1:] if was(look)), None) for what, was in seen.items()}
        return {what: look.at_seconds - start for what, look in first.items() if look is not None}

    def _new_pods(self, start: datetime) -> list[dict[str, Any]]:
        """How the replacements came, in seconds from the first fault."""
        lives = {uid: life for look in self.looks for uid, life in look.lives.items()}
        return [
            {
                "pod": pod.name,
                "place": pod.place,
                "node": pod.node,
                "seconds": {what: round((at - start).total_seconds(), 1) for what, at in lives[pod.uid].items()},
            }
            for pod in self.made_since(self.before)
        ]

    def recoveries(self) -> list[dict[str, Any]]:
        """Since the first fault, as the engines measured them."""
        if not self.faults:
            return []
        start = self.first_fault.at
        return [
            {
                "kind": str(each.kind),
                "instance": each.instance,
                "stages": list(each.stages),
                "donor": each.donor,
                "reason": each.reason,
                "after_seconds": round((each.detected_at - start).total_seconds(), 3),
                "stall_seconds": self._stall_of(each),
                "restored_after_seconds": (each.restored_at - start).total_seconds() if each.restored_at else None,
                "phases_ms": each.phases,
                "requests": each.requests_affected,
                "tokens_recomputed": each.tokens_recomputed,
                "tokens_kept": each.tokens_kept,
            }
            for each in self.now.recoveries_since(start)
        ]
