"""vLLM takes our executor with pipeline parallelism, and engine and stages tell differing settings by name."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from resilientllm_worker.seams.launch import (
    EXECUTOR,
    SCHEDULER,
    BadConfiguration,
    config_digest,
    describe_difference,
    make_config,
    make_parser,
    prepare,
)


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return make_parser("resilientllm-test", "A test.")


def test_vllm_still_refuses_a_plain_dotted_executor_with_pipeline_parallelism() -> None:
    """If it does not, the str subclass in seams/launch.py can go."""
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(NotImplementedError):
        EngineArgs(pipeline_parallel_size=2, distributed_executor_backend=EXECUTOR)._check_feature_supported()


def test_the_config_has_our_executor_and_our_scheduler(vllm_config: Any) -> None:
    from resilientllm_worker.engine.executor import ResilientExecutor
    from resilientllm_worker.engine.scheduler import ResilientScheduler
    from vllm.v1.executor.abstract import Executor

    assert Executor.get_class(vllm_config) is ResilientExecutor
    assert vllm_config.scheduler_config.get_scheduler_cls() is ResilientScheduler
    assert vllm_config.parallel_config.pipeline_parallel_size == 2
    assert vllm_config.max_concurrent_batches == 2, "as many steps in flight as stages"
    assert not vllm_config.scheduler_config.async_scheduling


def test_arguments_name_them_as_vllm_resolves_them(parser: argparse.ArgumentParser, tiny_model: Path) -> None:
    args = parser.parse_args([str(tiny_model), "--pipeline-parallel-size", "2"])
    prepare(args)
    assert (args.model, args.distributed_executor_backend, args.scheduler_cls) == (str(tiny_model), EXECUTOR, SCHEDULER)
    assert args.distributed_executor_backend.supports_pp


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--enable-lora"], "LoRA"),
        (["--enable-prompt-embeds"], "prompt embeddings"),
        (["--async-scheduling"], "async-scheduling"),
        (["--data-parallel-size", "2"], "data parallelism"),
        (["--api-server-count", "2"], "one API server"),
        (["--headless"], "--headless"),
        (["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'], "speculative decoding"),
        (["--kv-transfer-config", '{"kv_connector": "NixlConnector", "kv_role": "kv_both"}'], "KV connectors"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused_by_name(
    parser: argparse.ArgumentParser, tiny_model: Path, flags: list[str], complaint: str
) -> None:
    args = parser.parse_args([str(tiny_model), *flags])
    with pytest.raises(BadConfiguration, match=complaint):
        prepare(args)


def test_a_model_that_is_not_there_is_refused_in_one_line(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    args = parser.parse_args([str(tmp_path / "nothing")])
    with pytest.raises(BadConfiguration, match=r"expected a folder with a config\.json") as refusal:
        prepare(args)
    assert "\n" not in str(refusal.value)


def test_more_stages_than_layers_are_refused(
    parser: argparse.ArgumentParser, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    args = parser.parse_args([str(tiny_model), "--pipeline-parallel-size", "7", "--max-model-len", "256"])
    prepare(args)
    with pytest.raises(BadConfiguration, match=r"6 layers .* 7 stages") as refusal:
        make_config(args)
    assert "\n" not in str(refusal.value)


class TestDigests:
    def test_they_name_what_changes_results_or_shapes(self, vllm_config: Any) -> None:
        facts = json.loads(config_digest(vllm_config))
        assert (facts["block_size"], facts["stages"], facts["max_num_batched_tokens"]) == (16, 2, 64)
        assert None not in (facts["vllm"], facts["model"], facts["dtype"], facts["max_model_len"], facts["seed"])

    def test_equal_settings_do_not_differ(self, vllm_config: Any) -> None:
        assert describe_difference(config_digest(vllm_config), config_digest(vllm_config)) == ""

    def test_a_difference_is_told_with_both_values(self) -> None:
        ours, theirs = '{"block_size": 16, "seed": 0}', '{"block_size": 32, "seed": 0}'
        assert describe_difference(ours, theirs) == "block_size: 16 here, 32 there"

    def test_a_fact_that_only_one_side_knows_is_a_difference(self) -> None:
        assert describe_difference("{}", '{"seed": 0}') == "seed: None here, 0 there"
