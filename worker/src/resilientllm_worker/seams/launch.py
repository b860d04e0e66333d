"""Seam: vLLM's command line and configuration.

Engine and stages take every flag of ``vllm serve`` and must come to the same `VllmConfig`. Stock argument checks refuse
a dotted executor path together with pipeline parallelism, because they look for ``supports_pp`` on the *string*
(vllm/engine/arg_utils.py, ``_check_feature_supported``); a str that has the attribute passes them, and all later code
resolves it as the dotted path that it is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from resilientllm_worker.seams.model_class import look_at_models_here

if TYPE_CHECKING:
    from vllm.config import VllmConfig

EXECUTOR = "resilientllm_worker.engine.executor.ResilientExecutor"
SCHEDULER = "resilientllm_worker.engine.scheduler.ResilientScheduler"


class BadConfiguration(Exception):
    """The process cannot run with what it was given; a restart will not help. Ends it with exit code 2."""


class _PipelineCapable(str):
    supports_pp = True


def make_parser(program: str, description: str) -> argparse.ArgumentParser:
    """vLLM's own ``serve`` parser under our name; the caller adds its flags to it."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    return make_arg_parser(FlexibleArgumentParser(prog=program, description=description))


def prepare(args: argparse.Namespace) -> None:
    """Put our executor and scheduler into parsed ``serve`` arguments.

    Raises:
        BadConfiguration: the flags contradict each other, or ask for what the data plane cannot do.
    """
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args

    if args.model_tag is not None:
        args.model = args.model_tag
    if args.api_server_count not in (None, 1) or args.headless or args.data_parallel_size != 1:
        raise BadConfiguration(
            "expected one API server and no data parallelism: every instance is an engine of its own; "
            "remove --api-server-count, --headless and --data-parallel-size, and raise the number of instances"
        )
    for flag, what in (
        ("speculative_config", "speculative decoding"),
        ("enable_lora", "LoRA"),
        ("kv_transfer_config", "KV connectors"),
        ("enable_prompt_embeds", "prompt embeddings"),
    ):
        if getattr(args, flag, None):
            raise BadConfiguration(f"{what} is not supported yet; remove --{flag.replace('_', '-')}")
    if args.async_scheduling:
        raise BadConfiguration("--async-scheduling is not supported yet; remove it")
    path = Path(args.model)
    if path.is_absolute() and not (path / "config.json").is_file():
        raise BadConfiguration(
            f"model {args.model}: expected a folder with a config.json, found none; correct the path"
        )
    args.api_server_count = None
    args.async_scheduling = False
    args.distributed_executor_backend = _PipelineCapable(EXECUTOR)
    args.scheduler_cls = SCHEDULER
    try:
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as error:
        raise BadConfiguration(str(error)) from error


def make_config(args: argparse.Namespace) -> VllmConfig:
    """The `VllmConfig` of prepared arguments.

    Raises:
        BadConfiguration: the model cannot be read, or does not fit the layout.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    look_at_models_here()
    try:
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    except (OSError, ValueError, NotImplementedError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadConfiguration(f"model {args.model}: {first_line}") from error
    layers = config.model_config.get_total_num_hidden_layers()
    stages = config.parallel_config.pipeline_parallel_size
    if stages > layers:
        raise BadConfiguration(f"model {args.model} has {layers} layers and cannot be cut into {stages} stages")
    if config.model_config.runner_type != "generate":
        raise BadConfiguration(f"model {args.model} does not generate text ({config.model_config.runner_type})")
    return config


def config_digest(config: VllmConfig) -> str:
    """What an engine and its stages must agree on, as JSON that names each fact, so that a difference can be told."""
    import vllm

    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    return json.dumps(
        {
            "vllm": vllm.__version__,
            "v2_model_runner": bool(config.use_v2_model_runner),
            "model": model.model,
            "revision": model.revision,
            "dtype": str(model.dtype),
            "quantization": model.quantization,
            "seed": model.seed,
            "max_model_len": model.max_model_len,
            "max_logprobs": model.max_logprobs,
            "logprobs_mode": str(model.logprobs_mode),
            "block_size": cache.block_size,
            "cache_dtype": str(cache.cache_dtype),
            "stages": parallel.pipeline_parallel_size,
            "tensor_parallel": parallel.tensor_parallel_size,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
        },
        sort_keys=True,
    )


def describe_difference(ours: str, theirs: str) -> str:
    """Which facts of two digests differ, for an error message; empty if none."""
    if ours == theirs:
        return ""
    mine, other = json.loads(ours), json.loads(theirs)
    return ", ".join(
        f"{key}: {mine.get(key)!r} here, {other.get(key)!r} there"
        for key in sorted(mine.keys() | other.keys())
        if mine.get(key) != other.get(key)
    )
