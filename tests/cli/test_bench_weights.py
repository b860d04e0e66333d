"""What the benchmark makes of starts and of a twin that gives, and that a cold file is cold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from resilientllm_cli.bench import page_cache, weights_report
from resilientllm_cli.bench.estimates import distribution
from resilientllm_cli.bench.weights_run import COLD, SOURCES, TWIN, Burst, Giving, Start, split
from resilientllm_cli.streams import Stream


def stream(*arrivals: float) -> Stream:
    return Stream(0, tokens=list(range(len(arrivals))), arrivals_seconds=list(arrivals))


def test_an_interval_counts_where_all_of_it_lies() -> None:
    tokens = stream(0.0, 1.0, 2.0, 4.5, 5.5, 7.5, 9.0, 9.0)
    (giving,) = split([tokens], [Burst(began=4.0, ended=8.0, nbytes=100)], pause_seconds=4.0)
    assert giving.before == (1.0, 1.0), "the one that ends within the burst belongs to neither"
    assert giving.within == (1.0, 2.0)
    assert (giving.burst_seconds, giving.burst_bytes) == (4.0, 100)


def test_every_burst_has_its_own_pause() -> None:
    found = split([stream(0, 1, 2, 3, 4, 5), stream(1.5, 2)], [Burst(1, 2, 1), Burst(3, 4, 1)], pause_seconds=1)
    assert [(each.before, each.within) for each in found] == [((1,), (1, 0.5)), ((1,), (1,))]


def test_the_document_has_every_sample_and_the_ratio_of_pairs() -> None:
    starts = [Start(TWIN, 10.0, 0.5, 100, 0.0), Start(TWIN, 12.0, 0.7, 100, 0.0), Start(COLD, 14.0, 2.0, 100, 0.0)]
    giving = [Giving((0.2, 0.2), (0.1, 0.1), 5.0, 1000), Giving((0.4,), (0.2,), 5.0, 2000), Giving((), (0.1,), 5.0, 1)]
    found = json.loads(json.dumps(weights_report.document(starts, giving, distribution)))
    assert found["starts"][TWIN]["load_seconds"]["samples"] == [0.5, 0.7]
    assert found["starts"][COLD]["ready_seconds"]["p50"] == 14.0
    assert found["giving"]["interval_giving_over_not"]["value"] == pytest.approx(2.0)
    assert found["giving"]["interval_giving_over_not"]["n"] == 2
    assert found["giving"]["token_interval_seconds"]["giving"]["samples"] == [0.2, 0.2, 0.4]
    assert found["giving"]["bytes_per_second"] == [200.0, 400.0, 0.2]
    weights_report.table(found)


def test_what_was_not_measured_is_empty() -> None:
    found = weights_report.document([], [], distribution)
    assert {found["starts"][source]["load_seconds"]["n"] for source in SOURCES} == {0}
    assert found["giving"]["interval_giving_over_not"] is None
    weights_report.table(found)


def test_a_file_that_was_forgotten_is_not_in_memory_and_one_that_was_read_is(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(64 << 20))
    page_cache.warm(file)
    assert page_cache.resident(file) == 1.0
    page_cache.forget(file)
    if page_cache.resident(file) == 1.0:
        pytest.skip("this file system has nothing but memory")
    assert page_cache.resident(file) < 0.05
    assert page_cache.resident(file) < 0.05, "asking reads nothing"
