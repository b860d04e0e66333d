"""How far a long command is: on a terminal a bar below its lines, elsewhere its lines alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

REFRESHES = 2
"""Of the bar, in a second: benchmarks have the same cores."""


@contextmanager
def progress(console: Console, what: str, total: int | None = None) -> Iterator[Callable[[str], None]]:
    """Gives what prints a line and counts one more as done. ``total``: None where nobody knows it."""
    counted = () if total is None else (MofNCompleteColumn(),)
    left = () if total is None else (TextColumn("left:"), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), *counted, TimeElapsedColumn(), *left)
    with Progress(
        *columns, console=console, transient=True, refresh_per_second=REFRESHES, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=total)

        def say(line: str) -> None:
            # A line is a line, also where it is longer than a terminal is wide: others read it, too.
            console.print(line, highlight=False, markup=False, soft_wrap=True)
            bar.advance(task)

        yield say
