"""What the boards show of a life with real losses: recorded by a real Prometheus, drawn with the boards' own queries.

    python -m bench.boards record bench/results/DATE-boards.json
    python -m bench.boards draw bench/results/DATE-boards.json docs

``record`` (root) brings up a cluster of the end-to-end tests with the shipped manifests, keeps streams running, and
does what happens to machines: a process is killed, a node drained, a node loses its power, both copies of a stage are
killed. There is no Grafana; ``draw`` puts each panel where the board has it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.board_picture import draw
from e2e.cluster.errors import ClusterError
from e2e.demo.observation import Pod
from e2e.monitoring.boards import BOARDS, Chosen, panels
from e2e.monitoring.prometheus import SCRAPE_SECONDS, Prometheus, Series
from e2e.scenarios import fault
from e2e.scenarios.fault import Fault
from e2e.scenarios.ground import NAME, NAMESPACE, Ground

RATE_SECONDS = 10.0
"""Grafana's ``$__rate_interval``: some scrapes."""
CALM_SECONDS = 15.0
"""Before the first fault, and after each when all is whole again, so that what follows is told apart."""
WHOLE_SECONDS = 240.0


def record(output: Path) -> None:
    with _ground() as ground, Prometheus(ground.cluster) as prometheus:
        begin = time.time()
        faults: list[dict[str, Any]] = []

        def do(what: str, act: Callable[[], Fault]) -> Fault:
            landed = act()
            faults.append({"at": round(landed.at.timestamp() - begin, 1), "what": what})
            print(f"{faults[-1]['at']:6.1f} s  {what}: {landed.evidence}", flush=True)
            return landed

        with ground.load() as load:
            time.sleep(CALM_SECONDS)
            for what, act in _faults(ground):
                try:
                    mended = _until_whole(ground, do(what, act))
                except (AssertionError, ClusterError) as error:  # what was recorded so far is worth keeping
                    print(f"{what} did not land: {error}", flush=True)
                    continue
                print(f"{time.time() - begin:6.1f} s  {'whole' if mended else 'not whole'}", flush=True)
                time.sleep(CALM_SECONDS)
            load.finish(WHOLE_SECONDS)
        end = time.time()
        chosen = Chosen(NAMESPACE, NAME, range_seconds=end - begin, rate_interval_seconds=RATE_SECONDS)
        document = {
            "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(end - begin, 1),
            "step_seconds": SCRAPE_SECONDS,
            "streams": {
                "asked": len(load.sent),
                "complete": sum(each.stream.complete for each in load.sent),
                "errors": sorted({each.stream.error for each in load.sent if each.stream.error}),
            },
            "faults": faults,
            "chosen": asdict(chosen),
            "alerts": sorted(
                {
                    f"{each.labels['alertname']} {each.labels['alertstate']}"
                    for each in prometheus.over("ALERTS", begin, end, SCRAPE_SECONDS)
                }
            ),
            "boards": {board: list(_recorded(prometheus, board, chosen, begin, end)) for board in BOARDS},
        }
    output.write_text(_compact(document))


@contextmanager
def _ground() -> Iterator[Ground]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        models = Path(folder) / "models"
        models.mkdir()
        ground = Ground(models)
        try:
            ground.make()
            yield ground
        finally:
            ground.down()


def _faults(ground: Ground) -> Iterator[tuple[str, Callable[[], Fault]]]:
    """Each is chosen when its turn comes, of what is there then."""
    yield "stage 0.1 killed", lambda: fault.kill_stage(ground, ground.look().pod(0, 1))
    drained = ground.look().alone[0]
    yield f"node of stage {_number(drained)} drained", lambda: fault.drain_node(ground, drained)
    ground.cluster.kubectl("uncordon", fault.node_of(drained))
    dark = ground.look().alone[-1]
    yield f"node of stage {_number(dark)} without power", lambda: fault.kill_node(ground, dark)
    ground.cluster.start_node(fault.node_of(dark))
    yield "both copies of a stage killed", lambda: _kill_copies(ground)


def _until_whole(ground: Ground, done: Fault) -> bool:
    """Whether all is back within the bound. What is not is recorded, too."""
    deadline = time.monotonic() + WHOLE_SECONDS
    while time.monotonic() < deadline:
        look = ground.look()
        if look.whole and look.recoveries_since(done.at):
            return True
        time.sleep(1)
    return False


def _kill_copies(ground: Ground) -> Fault:
    look = ground.look()
    first, second = (fault.pids_of(ground, look.pod(instance, 1)) for instance in (0, 1))
    return fault.kill_processes(look.pod(0, 1), [*first, *second])


def _number(pod: Pod) -> str:
    return f"{pod.instance}.{pod.stage}"


def _recorded(prometheus: Prometheus, board: str, chosen: Chosen, begin: float, end: float) -> Iterator[dict[str, Any]]:
    for panel in panels(board):
        queries = []
        for query in panel.queries:
            expression = chosen.fill(query.expression)
            found = (
                prometheus.at(expression, end)
                if panel.is_instant
                else prometheus.over(expression, begin, end, SCRAPE_SECONDS)
            )
            queries.append(
                {"expression": expression, "legend": query.legend, "series": [_series(each, begin) for each in found]}
            )
        yield {"title": panel.title, "queries": queries}


def _series(series: Series, begin: float) -> dict[str, Any]:
    """Points on the grid of steps since the beginning: ``[number of the step, value]``."""
    return {
        "labels": series.labels,
        "points": [[round((at - begin) / SCRAPE_SECONDS), float(f"{value:.5g}")] for at, value in series.points],
    }


def _compact(document: dict[str, Any]) -> str:
    """A line for each series, so that a change can be read."""
    text = json.dumps(document, separators=(",", ":"))
    return text.replace('{"labels"', '\n{"labels"').replace('{"title"', '\n\n{"title"') + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.boards", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    recording = commands.add_parser("record", help="a run of some minutes, as root")
    recording.add_argument("file", type=Path)
    recording.set_defaults(run=lambda chosen: record(chosen.file))
    drawing = commands.add_parser("draw", help="a picture of each board")
    drawing.add_argument("file", type=Path)
    drawing.add_argument("folder", type=Path)
    drawing.set_defaults(run=lambda chosen: draw(json.loads(chosen.file.read_text()), chosen.folder))
    chosen = parser.parse_args()
    chosen.run(chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
