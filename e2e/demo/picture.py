"""Draws the scene with rich. Pure: the same scene and time give the same picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from resilientllm_api.crd import RecoveryStatus
from resilientllm_cli.comparison import gaps
from resilientllm_cli.streams import Stream
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .observation import Observation, Pod
from .report import Kill, Outcome, detection_ms, phases_in_order
from .scene import Scene, Step

_SHOWN_CHARACTERS = 32
_SHOWN_LINES = 2
"""Of the log. With 2 instances of 2 stages and 8 streams, all fits into a terminal of 24 lines."""
_BAR_WIDTH = 24
_STALLED_SECONDS = 0.25


def draw(scene: Scene, now_seconds: float) -> RenderableType:
    return Panel(Group(*_parts(scene, now_seconds)), title="ResilientLLM: kill -9, and the stream goes on")


def _parts(scene: Scene, now_seconds: float) -> Iterator[RenderableType]:
    yield _steps(scene.steps[-1:] if scene.streams else scene.steps, now_seconds)
    if scene.waits_for:
        yield _line(f"waits: {scene.waits_for}", "yellow")
    if scene.seen is not None and scene.seen.pods:
        yield _pods(scene.seen, scene.kill)
    if scene.streams:
        yield _streams(scene, now_seconds)
    if scene.kill is not None and scene.recovery is not None:
        yield _line(recovery_words(scene.recovery), "bold")
        yield _line(" · ".join(f"{phase} {ms:.1f} ms" for phase, ms in _phases(scene.kill, scene.recovery)), "bold")
    for seconds, words in scene.log[-_SHOWN_LINES:]:
        yield _line(f"{seconds:6.1f} s  {words}", "dim")


def _line(words: str, style: str) -> Text:
    return Text(words, style=style, no_wrap=True, overflow="ellipsis")


def _steps(steps: Sequence[Step], now_seconds: float) -> Table:
    table = Table.grid(padding=(0, 2))
    for step in steps:
        if step.seconds is None:
            table.add_row("…", Text(step.title, style="bold"), f"{now_seconds - step.started:.0f} s")
        else:
            table.add_row("✓", Text(step.title), f"{step.seconds:.1f} s")
    return table


def _pods(seen: Observation, kill: Kill | None) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("pod", "node", "state", "restarts", "serves the place"):
        table.add_column(heading)
    served_by = {
        (instance.instance, stage.stage): stage.served_by
        for instance in seen.status.instances
        for stage in instance.stages
    }
    for pod in seen.pods:
        killed = kill is not None and pod.name == kill.pod
        state = Text("ready" if pod.ready else pod.waiting or "starting", style="green" if pod.ready else "yellow")
        who = served_by.get((pod.instance, pod.stage)) if pod.stage is not None else None
        table.add_row(
            Text(pod.place, style="bold red" if killed else ""),
            pod.node or "-",
            state,
            str(pod.restarts),
            _server(pod, who),
        )
    return table


def _server(pod: Pod, served_by: str | None) -> Text:
    if pod.stage is None or served_by is None:
        return Text("")
    if served_by == f"{pod.instance}.{pod.stage}":
        return Text("itself", style="dim")
    return Text(f"stage {served_by} stands in", style="bold yellow")


def _streams(scene: Scene, now_seconds: float) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("stream", "", "tokens", "largest gap", "text"):
        table.add_column(heading, no_wrap=True)
    for stream in list(scene.streams):
        table.add_row(
            str(stream.index),
            ProgressBar(total=max(1, scene.tokens_wanted), completed=len(stream.tokens), width=_BAR_WIDTH),
            f"{len(stream.tokens)}/{scene.tokens_wanted}",
            _gap(stream, now_seconds),
            _words(stream),
        )
    return table


def _gap(stream: Stream, now_seconds: float) -> Text:
    arrivals = [*stream.arrivals_seconds] if stream.complete else [*stream.arrivals_seconds, now_seconds]
    seen = gaps(arrivals)
    largest = max(seen, default=0.0)
    stalled = bool(seen) and not stream.complete and seen[-1] > _STALLED_SECONDS
    return Text(f"{largest * 1000:.0f} ms", style="bold red" if stalled else "")


def _words(stream: Stream) -> Text:
    if stream.error:
        return Text(stream.error[:_SHOWN_CHARACTERS], style="bold red")
    return Text(stream.text[-_SHOWN_CHARACTERS:], style="cyan")


def recovery_words(recovery: RecoveryStatus) -> str:
    places = ", ".join(f"{recovery.instance}.{stage}" for stage in recovery.stages)
    donor = f", {recovery.donor} stood in" if recovery.donor else ""
    return (
        f"Stage {places} was lost ({recovery.reason}){donor}: {recovery.requests_affected} requests, "
        f"{recovery.tokens_recomputed} tokens computed again, {recovery.tokens_kept} kept"
    )


def recovery_table(kill: Kill, recovery: RecoveryStatus) -> Table:
    """The phases of a recovery, as the engine measured them."""
    table = Table()
    table.add_column("phase")
    table.add_column("ms", justify="right")
    for phase, milliseconds in _phases(kill, recovery):
        table.add_row(phase, f"{milliseconds:.1f}", style="bold" if phase == "total" else "")
    return table


def _phases(kill: Kill, recovery: RecoveryStatus) -> Iterator[tuple[str, float]]:
    """From the kill on; the total is the engine's, which cannot know when somebody was killed."""
    yield "detect", detection_ms(kill, recovery)
    yield from phases_in_order(recovery).items()


def outcome_table(outcome: Outcome) -> Table:
    """What every client got, beside what it should have got."""
    table = Table()
    for heading in ("stream", "tokens", "lost", "duplicated", "changed", "stall", "equal"):
        table.add_column(heading, justify="right")
    rows: Sequence[Stream] = outcome.delivered
    for stream, tokens, stall in zip(rows, outcome.tokens, outcome.stalls_seconds, strict=True):
        equal = stream.complete and tokens.unharmed
        table.add_row(
            str(stream.index),
            str(tokens.delivered),
            str(tokens.lost),
            str(tokens.duplicated),
            str(tokens.changed),
            "over before" if stall is None else f"{stall * 1000:.0f} ms",
            Text("yes" if equal else "NO", style="green" if equal else "bold red"),
        )
    return table
