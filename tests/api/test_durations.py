from __future__ import annotations

import pytest
from resilientllm_api.durations import format_ms, parse_seconds


@pytest.mark.parametrize(
    ("text", "seconds"), [("250ms", 0.25), ("30s", 30), ("1m30s", 90), ("1.5h", 5400), ("0s", 0), ("1m1ms", 60.001)]
)
def test_reads_what_people_write(text: str, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "30", "s", "-1s", "1 s", "1d", "1s "])
def test_refuses_the_rest(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_seconds(text)


@pytest.mark.parametrize(("ms", "text"), [(0, "0ms"), (87.4, "87ms"), (1949, "1.9s"), (41200, "41s")])
def test_writes_what_people_read(ms: float, text: str) -> None:
    assert format_ms(ms) == text
