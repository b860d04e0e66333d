"""What a stage says of itself to Prometheus: figures of home and guest apart, read when somebody asks."""

from __future__ import annotations

import contextlib
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from resilientllm_worker.protocol.messages import StepResult
from resilientllm_worker.stage.health import HealthServer, NotReady
from resilientllm_worker.stage.metrics import StageMetrics, WeightsMetrics, make_registry
from resilientllm_worker.stage.step_times import BUCKETS_SECONDS, StepTimes

from tests.worker.stage.builders import GUEST, HOME_BLOCKS, POOL_BLOCKS, Engine, Neighbour, Stage, closing


class Scraped:
    def __init__(self, stage: Stage) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(StageMetrics("0.1", lambda: stage.server.figures))

    def __call__(self, name: str, **labels: str) -> float | None:
        return self._registry.get_sample_value(f"resilientllm_stage_{name}", {"stage": "0.1", **labels})


def test_steps_and_hidden_states_are_counted_for_home_and_guest_apart() -> None:
    with Stage() as stage, closing(home := Engine(stage.address), guest := Engine(stage.address, GUEST)):
        scraped = Scraped(stage)
        home.stitch(epoch=1)
        guest.stitch(epoch=1)
        with closing(link := Neighbour(stage.address, epoch=1, instance=GUEST)):
            for number in range(3):
                guest.step(number, epoch=1)
                link.send(number, rows=[1.0, 2.0, 3.0])
                guest.expect(StepResult)

            assert scraped("step_seconds_count") == 3
            assert scraped("step_seconds_bucket", le="+Inf") == 3
            assert scraped("link_bytes_total", tenant="guest", direction="received") == 3 * 3 * 4
            assert scraped("link_bytes_total", tenant="home", direction="received") == 0
            assert (scraped("serves", tenant="home"), scraped("serves", tenant="guest")) == (1, 1)
            guest.release(epoch=2)
            guest.ask_stitch(epoch=0)  # its answer says that what came before has been read
            assert scraped("serves", tenant="guest") == 0


def test_hidden_states_that_go_on_are_counted_too() -> None:
    with Stage(stage=1) as following, Stage(stage=0) as stage, closing(engine := Engine(stage.address)):
        with closing(next_engine := Engine(following.address)):
            next_engine.stitch(epoch=1)
            engine.stitch(epoch=1, following=following.address)
            engine.step(0, epoch=1)
            following.wait_arrived(0, step=0)

        assert Scraped(stage)("link_bytes_total", tenant="home", direction="sent") == 3 * 4


def test_the_pool_is_told_by_its_use() -> None:
    with Stage(stage=0) as stage, closing(guest := Engine(stage.address, GUEST)):
        scraped = Scraped(stage)
        assert scraped("home_blocks") == HOME_BLOCKS
        assert scraped("pool_blocks", use="free") == POOL_BLOCKS
        guest.stitch(epoch=1)
        guest.step(0, epoch=1, block_ids=([1, 2],))
        guest.expect(StepResult)
        assert scraped("pool_blocks", use="guest") == 2
        assert scraped("pool_blocks", use="free") == POOL_BLOCKS - 2


@given(st.lists(st.floats(0.0, 20.0)))
def test_the_histogram_counts_every_step_once(seconds: list[float]) -> None:
    times = StepTimes()
    for each in seconds:
        times.observe(each)
    buckets, total = times.read()

    assert dict(buckets) == {
        **{str(bound): sum(each <= bound for each in seconds) for bound in BUCKETS_SECONDS},
        "+Inf": len(seconds),
    }
    assert total == pytest.approx(sum(seconds))


@contextlib.contextmanager
def served(registry: CollectorRegistry) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = HealthServer("127.0.0.1", port, lambda: NotReady("it has no weights yet"), registry)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.close()


def families(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        text = response.read().decode()
    return {sample.name: sample.value for each in text_string_to_metric_families(text) for sample in each.samples}


def test_the_health_port_has_them_also_before_there_are_weights() -> None:
    registry = make_registry()
    with served(registry) as url:
        assert families(url)["process_start_time_seconds"] > 0
        registry.register(WeightsMetrics("0.1", "twin", 1.5, 4096))
        assert families(url)["resilientllm_stage_weights_bytes"] == 4096
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{url}/readyz", timeout=30)
        refused.value.close()
        assert refused.value.code == 503
