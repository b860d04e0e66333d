"""`make chaos`: python -m e2e.chaos. Faults of all kinds under load; a line of JSON each.

What needs no Kubernetes is done by `resilientllm chaos`, the rest then on a real cluster, which needs root.

Exit status: 0, or 1 when a run had a problem; 2 wrong usage; 130 interrupted (nothing stays).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from resilientllm_cli.chaos.faults import KINDS as LOCAL_KINDS

from e2e.chaos import cluster_runs, local_runs
from e2e.chaos.kinds import KINDS as CLUSTER_KINDS
from e2e.cluster.errors import ClusterError
from e2e.cluster.launch import REPOSITORY

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130


def main(words: list[str] | None = None) -> int:
    arguments = _parse(words)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    deadline = time.monotonic() + arguments.for_seconds
    failed = False
    try:
        if arguments.local:
            code = local_runs.run(_words_for_local(arguments))
            if code not in (0, FAILED):
                return code
            failed |= code == FAILED
        if arguments.cluster:
            failed |= cluster_runs.run(
                [CLUSTER_KINDS[name] for name in arguments.cluster],
                range(arguments.seed, arguments.seed + arguments.runs),
                arguments.output,
                arguments.directory,
                deadline,
                resume=arguments.resume,
            )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return FAILED if failed else 0


def _parse(words: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments = parser.parse_args(words)
    local, cluster = list(LOCAL_KINDS), [] if arguments.soak else list(CLUSTER_KINDS)
    names = arguments.faults.split(",") if arguments.faults else [*local, *cluster]
    if unknown := [name for name in names if name not in local and name not in cluster]:
        parser.error(f"unknown faults {', '.join(unknown)}: expected some of {', '.join([*local, *cluster])}")
    arguments.local = [name for name in names if name in local]
    arguments.cluster = [name for name in names if name in cluster]
    if arguments.cluster and os.geteuid() != 0:
        parser.error(
            f"{', '.join(arguments.cluster)} need a cluster, and that needs root: use sudo, or choose --faults"
        )
    for folder in (arguments.directory, arguments.output.parent):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"{folder} must be a folder, or one that can be made: {error.strerror}")
    return arguments


def _words_for_local(arguments: argparse.Namespace) -> list[str]:
    words = [f"--faults={','.join(arguments.local)}"]
    for name in ("runs", "seed", "shapes", "for_seconds", "output", "directory"):
        value = getattr(arguments, name)
        if value is not None:
            words.append(f"--{name.replace('_', '-')}={value}")
    words += [f"--{name}" for name in ("resume", "soak") if getattr(arguments, name)]
    return words


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m e2e.chaos", description=(__doc__ or "").partition("\n")[0])
    kinds = f"{', '.join(LOCAL_KINDS)}; on a cluster: {', '.join(CLUSTER_KINDS)}"
    parser.add_argument("--faults", default="", metavar="KIND,…", help=f"default: all of {kinds}")
    parser.add_argument("--runs", type=int, default=20, help="of each kind (default: %(default)s)")
    parser.add_argument("--shapes", help="instances x stages, in turns; a cluster always has 2x2")
    parser.add_argument("--seed", type=int, default=1, help="of the first run; the next ones count on from it")
    parser.add_argument("--for-seconds", type=float, default=float("inf"), help="begin no run after that")
    parser.add_argument("--resume", action="store_true", help="leave out what the output has already")
    parser.add_argument("--soak", action="store_true", help="kinds that need no cluster at random, in one world")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "build" / "chaos.jsonl", help="lines are appended")
    parser.add_argument("--directory", type=Path, default=REPOSITORY / "build" / "chaos", help="timelines and logs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
