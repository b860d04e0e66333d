"""Kinds that need a cluster: one cluster with one object, a fault of each kind in turns, whole before each."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

from resilientllm_cli.chaos import leaks
from resilientllm_cli.chaos import line as lines
from resilientllm_cli.progress import progress
from rich.console import Console

from e2e.chaos import holdings
from e2e.chaos.kinds import ClusterKind
from e2e.chaos.record import SHAPE, After, Record, line, timeline
from e2e.demo import installation
from e2e.scenarios.ground import Ground
from e2e.scenarios.scenario import Scenario

WHOLE_SECONDS = 240.0
LONGEST_WAIT_SECONDS = 3.0
"""From when all streams are in the middle until the fault."""
REST_SECONDS = 20.0
"""Between two rounds of streams, so that a stage that starts beside them has a core."""


def run(
    kinds: Sequence[ClusterKind], seeds: Sequence[int], output: Path, directory: Path, deadline: float, *, resume: bool
) -> bool:
    """Whether any run had a problem. None begins after ``deadline``, of ``time.monotonic``. ``resume``: those that
    ``output`` has are left out. Raises ClusterError where no cluster can be made."""
    done = {(each["fault"], each["shape"], each["seed"]) for each in _told(output)} if resume else set()
    wanted = [(kind, seed) for seed in seeds for kind in kinds if (kind.name, SHAPE, seed) not in done]
    failed = False
    if not wanted:
        return failed
    if time.monotonic() > deadline:
        print(f"{len(wanted)} runs on a cluster were not begun: the time is over", file=sys.stderr)
        return failed
    total = len(wanted) if deadline == float("inf") else None
    with tempfile.TemporaryDirectory() as folder, progress(Console(), "chaos on a cluster", total) as say:
        ground = Ground(installation.open_to_all(Path(folder)))
        try:
            ground.make()
            for number, (kind, seed) in enumerate(wanted):
                if time.monotonic() > deadline:
                    say(f"{len(wanted) - number} runs on a cluster were not begun: the time is over")
                    break
                began = time.monotonic()
                record = run_one(ground, kind, seed)
                failed |= bool(record.line.problems)
                record.write(output, directory)
                say(record.line.in_words(time.monotonic() - began))
        finally:
            ground.down()
    return failed


def run_one(ground: Ground, kind: ClusterKind, seed: int) -> Record:
    """Never raises for what the fault did: that is in the line. Raises ClusterError where no cluster can be had.

    The victim is a stage alone on its node, so that whoever ends the node ends exactly one. Which stages are alone
    depends on the runs before.
    """
    random = Random(f"{kind.name} {seed}")
    scenario = Scenario(ground, f"chaos/{kind.name}-{seed}", ground.whole())
    pod = random.choice(sorted(scenario.before.alone or scenario.before.stages, key=lambda each: each.place))
    problems: list[str] = []
    whole: float | None = None
    after: After | None = None
    try:
        before = holdings.look(ground).all
        scenario.start_load(pause_seconds=REST_SECONDS)
        time.sleep(random.uniform(0.0, LONGEST_WAIT_SECONDS))
        if not scenario.streams_run:
            scenario.meet_streams()
        kind.inject(scenario, pod, random)
        look = scenario.until_whole(WHOLE_SECONDS, moves=kind.change is not None)
        whole = round(look.at_seconds - scenario.first_fault.at_seconds, 1)
        scenario.judge()
        leaked = leaks.settled(before, lambda: holdings.look(ground).all)
        after = After(f"{ground.name}-{ground.remade}", leaked, holdings.look(ground).held())
        scenario.look()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told, and the next run begins
        problems.append(f"{type(error).__name__}: {error}")
    finally:
        scenario.close()
    record = Record(line(scenario, kind, seed, pod, whole, problems, after), timeline(scenario))
    if record.line.problems:
        scenario.keep_evidence("\n".join(record.line.problems))
    return record


def _told(output: Path) -> Sequence[dict[str, object]]:
    return lines.read(output.read_text()) if output.exists() else ()
