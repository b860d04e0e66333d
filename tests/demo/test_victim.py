"""Whom the demo kills."""

from __future__ import annotations

import pytest

from e2e.cluster.errors import ClusterError
from e2e.demo.victim import busiest, running_in


def test_instance_with_most_requests_is_chosen() -> None:
    assert busiest({0: 2, 1: 6}) == 1


def test_first_of_equals_is_chosen() -> None:
    assert busiest({1: 4, 0: 4}) == 0


def test_kill_that_would_meet_no_request_is_refused() -> None:
    with pytest.raises(ClusterError, match="an engine that serves some of the streams"):
        busiest({0: 0, 1: 0})


def test_requests_are_read_from_the_metrics() -> None:
    metrics = (
        "# HELP vllm:num_requests_running Number of requests in model execution batches.\n"
        'vllm:num_requests_running{engine="0",model_name="tiny"} 5.0\n'
        'vllm:num_requests_running_other{engine="0"} 9.0\n'
    )
    assert running_in(metrics) == 5


def test_missing_metric_is_an_error_and_not_zero() -> None:
    with pytest.raises(ClusterError, match="the metric vllm:num_requests_running"):
        running_in("process_cpu_seconds_total 1.0\n")
