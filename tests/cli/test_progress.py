"""A bar on a terminal, and nothing but lines elsewhere."""

from __future__ import annotations

import io

import pytest
from resilientllm_cli.progress import progress
from rich.console import Console

LONG = "a line that is longer than the terminal is wide [not markup] " * 3


def told(*, terminal: bool, total: int | None) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=60, color_system=None)
    with progress(console, "chaos", total) as say:
        say("first")
        say(LONG)
    return file.getvalue()


@pytest.mark.parametrize("total", [3, None])
def test_elsewhere_there_are_only_lines(total: int | None) -> None:
    assert told(terminal=False, total=total) == f"first\n{LONG}\n"


def test_on_a_terminal_a_bar_says_how_many_are_done() -> None:
    text = told(terminal=True, total=3)
    assert "first\n" in text
    assert "2/3" in text and "chaos" in text


def test_without_a_total_it_says_for_how_long_it_has_been_running() -> None:
    text = told(terminal=True, total=None)
    assert "0:00:0" in text and "2/" not in text
