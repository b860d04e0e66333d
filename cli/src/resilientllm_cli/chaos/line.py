"""One run as a line of JSON, and many of them as a table. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from resilientllm_cli.comparison import percentile


@dataclass(frozen=True)
class Line:
    fault: str
    shape: str
    seed: int
    """With kind and shape it makes the same choices again: ``--faults``, ``--shapes``, ``--seed``."""
    landed: dict[str, Any]
    """The evidence; empty if the fault did not happen."""
    phase: str = ""
    victim: str = ""
    prompts_without_token: int = 0
    """Streams in prefill at the moment of the fault."""
    streams_met: int = 0
    """That were not over by then."""
    lost: int = 0
    duplicated: int = 0
    changed: int = 0
    failed_explicitly: int = 0
    """Requests that ended with the error that says to send them again. Their tokens until then are compared."""
    failed_otherwise: int = 0
    overtaken: int = 0
    """By how many requests that came after the fault one was, at most, that had no token yet when it came."""
    donor_existed: bool = True
    detection_seconds: float | None = None
    """From the fault to the engine's suspicion; None where nothing was suspected."""
    fence_seconds: float | None = None
    """From the fault until the fences of the first recovery were sent."""
    first_token_seconds: float | None = None
    """From the fault to the first token after that recovery, at the engine."""
    stall_seconds: float | None = None
    """Of the stream that was worst; None if none was met."""
    stalls_seconds: tuple[float, ...] = ()
    recoveries: tuple[dict[str, Any], ...] = ()
    whole_after_seconds: float | None = None
    """Since the streams had ended and the fault was undone."""
    leaks: dict[str, Any] = field(default_factory=dict)
    world: str = ""
    """Runs with the same one had the same processes, but for those that were lost."""
    held: dict[str, dict[str, int]] = field(default_factory=dict)
    """What each program holds after the run: over many runs that shows what grows slowly (``growth.py``)."""
    problems: tuple[str, ...] = ()
    """What was not as it should be; empty in a good run."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def in_words(self, seconds: float) -> str:
        """``seconds``: that the run took."""
        figures = ", ".join(
            f"{name} {value:.3f} s"
            for name, value in (("detected after", self.detection_seconds), ("stall", self.stall_seconds))
            if value is not None
        )
        verdict = "; ".join(self.problems) or "held"
        return f"{self.fault} {self.shape} seed {self.seed} in {seconds:.1f} s: {figures or 'no figures'}: {verdict}"


HEADER = (
    *("fault", "n", "landed", "detection p50", "stall p50", "stall p99"),
    *("lost", "duplicated", "changed", "failed explicitly", "otherwise", "with a problem"),
)


def table(lines: Iterable[dict[str, Any]]) -> str:
    """Markdown: a row for each kind. Seconds; stalls of all streams that a fault met."""
    rows = [HEADER, tuple("---" for _ in HEADER)]
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_kind.setdefault(line["fault"], []).append(line)
    for kind, runs in by_kind.items():
        detections = [run["detection_seconds"] for run in runs if run["detection_seconds"] is not None]
        stalls = [stall for run in runs for stall in run["stalls_seconds"]]
        sums = (sum(run[name] for run in runs) for name in ("lost", "duplicated", "changed"))
        failed = (sum(run[name] for run in runs) for name in ("failed_explicitly", "failed_otherwise"))
        rows.append(
            (
                kind,
                str(len(runs)),
                str(sum(bool(run["landed"]) for run in runs)),
                _seconds(detections, 50),
                _seconds(stalls, 50),
                _seconds(stalls, 99),
                *map(str, sums),
                *map(str, failed),
                str(sum(bool(run["problems"]) for run in runs)),
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _seconds(samples: Sequence[float], percent: float) -> str:
    return f"{percentile(samples, percent):.3f}" if samples else "–"


def read(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]
