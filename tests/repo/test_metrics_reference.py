"""The reference of metrics is what the code registers, and every metric is one that can be asked for years."""

from __future__ import annotations

import pytest

from tools.metrics_reference import DOCUMENT, LABELS, Documented, render, sections

METRICS = [metric for section in sections() for metric in section.metrics]
BASE_UNITS = ("_seconds", "_bytes", "_tokens", "_blocks")
OTHER_UNITS = ("_ms", "_milliseconds", "_minutes", "_kb", "_mb", "_gb", "_percent")
UNBOUNDED = {"pod", "node", "request", "uid", "ip", "address", "instance"}
"""The last one is Prometheus' own."""


def test_it_is_not_stale() -> None:
    assert DOCUMENT.read_text() == render(), "docs/metrics.md is stale: run `make generate`"


def test_every_part_has_some() -> None:
    assert [len(section.metrics) > 10 for section in sections()] == [True] * 3


def test_no_two_parts_have_metrics_of_one_name() -> None:
    names = [metric.name for metric in METRICS]

    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_metric_is_named_and_explained_as_agreed(metric: Documented) -> None:
    assert metric.name.startswith("resilientllm_")
    assert not metric.name.removesuffix("_total").endswith(OTHER_UNITS)
    assert metric.kind in ("counter", "gauge", "histogram")
    assert metric.kind != "histogram" or metric.name.endswith(BASE_UNITS)
    assert metric.documentation.endswith(".") and "|" not in metric.documentation
    assert not set(metric.labels) & UNBOUNDED
    assert set(metric.labels) <= LABELS.keys()
