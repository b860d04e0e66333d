"""What the live view and the tables say, drawn without a terminal."""

from __future__ import annotations

import io
from dataclasses import replace

from resilientllm_cli.streams import Stream
from rich.console import Console, RenderableType

from e2e.demo.observation import Observation, Pod
from e2e.demo.picture import draw, outcome_table, recovery_table
from e2e.demo.scene import Scene, Step
from tests.demo.builders import KILL, RECOVERY, outcome, stream


def drawn(picture: RenderableType, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(picture)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def scene() -> Scene:
    made = Scene(started=100.0)
    made.steps = [Step("cluster", "a Kubernetes", 100.0, 7.0), Step("ready", "until it is Ready", 107.0)]
    return made


def test_empty_scene_is_drawn() -> None:
    assert "ResilientLLM" in drawn(draw(Scene(started=0.0), 0.0))


def test_steps_tell_how_long_they_took_or_go_on() -> None:
    said = drawn(draw(scene(), 117.0))

    assert "a Kubernetes" in said and "7.0 s" in said
    assert "until it is Ready" in said and "10 s" in said


def test_all_of_a_recovery_fits_into_an_ordinary_terminal() -> None:
    busy = scene()
    busy.seen = Observation(
        None, tuple(Pod(i, k, "p", "u", "n", None, True, 0, None) for i in (0, 1) for k in (0, 1, 2))
    )
    busy.streams, busy.tokens_wanted = [stream(index, [1, 2]) for index in range(8)], 20
    busy.kill, busy.recovery = KILL, RECOVERY
    busy.waits_for = "StageBorrowed: " + "many words " * 20
    busy.log = [(1.0, "many words " * 20)] * 9

    said = drawn(draw(busy, 110.0), width=80)
    assert len(said.splitlines()) <= 24
    assert "Stage 1.0 was lost (ConnectionReset), 0.0 stood in" in said
    assert "detect 2.0 ms · fence 1.0 ms · stitch 2.0 ms" in said


def test_wait_tells_its_reason() -> None:
    waiting = scene()
    waiting.waits_for = "StagesLoading: Stages load"

    assert "waits: StagesLoading: Stages load" in drawn(draw(waiting, 110.0))


def test_pods_tell_where_they_are_and_what_they_wait_for() -> None:
    busy = scene()
    pod = Pod(1, 0, "tiny-1-s0-abc", "uid", "node-2", None, False, 3, "ImagePullBackOff")
    busy.seen = Observation(None, (pod,))

    said = drawn(draw(busy, 110.0))
    assert all(word in said for word in ("stage 1.0", "node-2", "ImagePullBackOff", "3"))


def test_streams_tell_their_tokens_their_largest_gap_and_their_end() -> None:
    busy = scene()
    broken = Stream(1, error="APIError: gone")
    busy.streams, busy.tokens_wanted = [stream(0, list(range(10))), broken], 20

    said = drawn(draw(busy, 110.0))
    assert "10/20" in said and "100 ms" in said and "APIError: gone" in said


def test_stream_that_goes_on_counts_the_time_since_its_last_token() -> None:
    busy = scene()
    open_stream = Stream(0, tokens=[1, 2], arrivals_seconds=[104.0, 104.1])
    busy.streams, busy.tokens_wanted = [open_stream], 20

    assert "900 ms" in drawn(draw(busy, 105.0))


def test_text_that_looks_like_markup_is_text() -> None:
    busy = scene()
    busy.streams, busy.tokens_wanted = [replace(stream(0, [1]), text="[/bold] [red]")], 1

    assert "[/bold] [red]" in drawn(draw(busy, 110.0))


def test_phases_are_in_the_order_in_which_they_happened() -> None:
    said = drawn(recovery_table(KILL, RECOVERY))
    places = [said.index(phase) for phase in ("detect", "fence", "stitch", "rollBack", "resume", "total")]

    assert places == sorted(places)


def test_outcome_shows_which_stream_is_not_equal() -> None:
    said = drawn(outcome_table(outcome(stream(0, list(range(19))), stream(1, list(range(50, 70)))))).splitlines()

    rows = [line for line in said if "yes" in line or "NO" in line]
    assert ["NO" in row for row in rows] == [True, False]
