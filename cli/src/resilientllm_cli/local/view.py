"""How a local run looks: a table on a terminal, a line for every change elsewhere. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.table import Table

from resilientllm_cli.local.state import LocalState

Show = Callable[[LocalState | None, LocalState], None]
"""Is told of every change: the state before, and after."""

STYLES = {True: "green", False: "yellow"}


def table(state: LocalState) -> Table:
    view = Table(
        title="every instance runs on its own stages" if state.ready else "not yet whole", title_justify="left"
    )
    for heading in ("what", "phase", "pid", "at", "restarts", "replica lag", ""):
        view.add_column(heading)
    for engine in state.engines:
        view.add_row(
            f"engine {engine.instance}",
            f"[{STYLES[engine.on_own_stages]}]{engine.phase}",
            str(engine.pid or "-"),
            engine.url,
            str(engine.restarts),
            "-" if engine.lag_seconds is None else f"{engine.lag_seconds:g} s",
            engine.message,
        )
    for stage in state.stages:
        view.add_row(
            f"stage {stage.instance}.{stage.stage}" + (f" rank {stage.rank}" if stage.rank else ""),
            f"[{STYLES[stage.ready]}]{stage.phase}",
            str(stage.pid or "-"),
            stage.address,
            str(stage.restarts),
            "",
            "",
        )
    return view


def transitions(before: LocalState | None, after: LocalState) -> Iterator[str]:
    """One line for each engine and stage whose phase changed, and one when ``ready`` did."""
    phases_before = dict(_phases(before)) if before else {}
    for who, phase in _phases(after):
        if phases_before.get(who) != phase:
            yield f"{who}: {phase}"
    if after.ready != (before.ready if before else False):
        yield f"ready: {' '.join(engine.url for engine in after.engines)}" if after.ready else "not ready"


def _phases(state: LocalState) -> Iterator[tuple[str, str]]:
    for engine in state.engines:
        yield f"engine {engine.instance}", f"{engine.phase} {engine.message}".strip()
    for stage in state.stages:
        if stage.rank == 0:
            yield f"stage {stage.instance}.{stage.stage}", stage.phase
