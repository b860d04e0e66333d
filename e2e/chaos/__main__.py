"""`python -m e2e.chaos`: faults on a real cluster under load; a line of JSON each, in the file of `resilientllm chaos`.

Exit status 1 when a run had a problem. Needs root.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from e2e.chaos.kinds import KINDS, ClusterKind
from e2e.chaos.record import Record, line, timeline
from e2e.cluster.errors import ClusterError
from e2e.cluster.launch import REPOSITORY
from e2e.demo import installation
from e2e.scenarios.ground import Ground
from e2e.scenarios.scenario import Scenario

WHOLE_SECONDS = 240.0
LONGEST_WAIT_SECONDS = 3.0
"""Faults come at any moment of the streams, which go on and on."""
REST_SECONDS = 20.0
"""Between two rounds of streams, so that a stage that starts beside them has a core."""


def main() -> int:
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    names = arguments.faults.split(",") if arguments.faults else list(KINDS)
    deadline = time.monotonic() + arguments.for_seconds
    problems = 0
    with tempfile.TemporaryDirectory() as folder:
        ground = Ground(installation.open_to_all(Path(folder)))
        try:
            ground.make()
            for number in range(arguments.runs):
                for name in names:
                    if time.monotonic() > deadline:
                        return int(problems > 0)
                    record = run(ground, KINDS[name], arguments.seed + number)
                    problems += bool(record.line.problems)
                    record.write(arguments.output, arguments.directory)
                    print(record.in_words, flush=True)
        finally:
            ground.down()
    return int(problems > 0)


def run(ground: Ground, kind: ClusterKind, seed: int) -> Record:
    """The victim is a stage alone on its node: whoever ends the node ends exactly one."""
    random = Random(f"{kind.name} {seed}")
    scenario = Scenario(ground, f"chaos/{kind.name}-{seed}", ground.whole())
    pod = random.choice(sorted(scenario.before.alone, key=lambda each: each.place))
    problems: list[str] = []
    whole: float | None = None
    try:
        scenario.start_load(pause_seconds=REST_SECONDS)
        time.sleep(random.uniform(0.0, LONGEST_WAIT_SECONDS))
        if not scenario.streams_run:
            scenario.meet_streams()
        kind.inject(scenario, pod, random)
        look = scenario.until_whole(WHOLE_SECONDS, moves=kind.moves)
        whole = round(look.at_seconds - scenario.first_fault.at_seconds, 1)
        scenario.judge()
    except (ClusterError, AssertionError, OSError) as error:
        problems.append(str(error))
        scenario.keep_evidence(str(error))
    finally:
        scenario.close()
    return Record(line(scenario, kind, seed, pod, whole, problems), timeline(scenario))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m e2e.chaos", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--faults", default="", metavar="KIND,…", help=f"default: all of {', '.join(KINDS)}")
    parser.add_argument("--runs", type=int, default=20, help="of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the first run")
    parser.add_argument("--for-seconds", type=float, default=float("inf"), help="begin no run after that")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "build" / "chaos.jsonl")
    parser.add_argument("--directory", type=Path, default=REPOSITORY / "build" / "chaos", help="for timelines")
    return parser


if __name__ == "__main__":
    sys.exit(main())
