"""What a person sees of the demo: a live picture on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.live import Live

from .picture import draw
from .scene import Scene, Step

_REFRESHES_PER_SECOND = 5


class Screen:
    """Owns the scene's steps and log. Without a terminal, every step, word and change of the wait is a line."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.scene = Scene(started=time.monotonic())
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(
                get_renderable=lambda: draw(self.scene, time.monotonic()),
                console=self.console,
                refresh_per_second=_REFRESHES_PER_SECOND,
                # The last picture stays; the table below it says the rest.
                transient=False,
            )

    def __enter__(self) -> Screen:
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, words: str) -> None:
        self.scene.log.append((time.monotonic() - self.scene.started, words))
        if self._live is None:
            self._print(words)

    def waits_for(self, words: str) -> None:
        """Told at every look; a line only when it changed."""
        if words != self.scene.waits_for and self._live is None:
            self._print(f"  waits: {words}")
        self.scene.waits_for = words

    def waits_for_tokens(self, came: int, wanted: int) -> None:
        """The picture shows the streams themselves."""
        if self._live is None:
            self._print(f"  {came} of {wanted} tokens")

    @contextmanager
    def step(self, name: str, title: str) -> Iterator[Step]:
        step = Step(name, title, started=time.monotonic())
        self.scene.steps.append(step)
        if self._live is None:
            self._print(f"{title} …")
        yield step
        step.seconds = time.monotonic() - step.started
        self.scene.waits_for = ""
        if self._live is None:
            self._print(f"{title}: {step.seconds:.1f} s")

    def _print(self, words: str) -> None:
        elapsed = time.monotonic() - self.scene.started
        self.console.print(f"[{elapsed:6.1f} s] {words}", markup=False, soft_wrap=True)
