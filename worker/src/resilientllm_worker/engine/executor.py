"""Seam: vLLM's Executor. Steps go to whatever stages serve the instance now; none of them is this engine's child."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.v1.executor.abstract import Executor
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

from resilientllm_worker.engine import environment, meeting_point
from resilientllm_worker.engine.control_link import ControlLink
from resilientllm_worker.engine.pipeline import LOST_STEP, AttachRefused, LostStep, Pipeline
from resilientllm_worker.protocol.messages import KVDescription, KVGroup, Stamp, Step, StepResult
from resilientllm_worker.seams.kv_cache_spec import decode_spec, encode_spec
from resilientllm_worker.seams.launch import config_digest
from resilientllm_worker.seams.model_output import decode_result
from resilientllm_worker.seams.scheduler_output import encode_step, unsupported

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(__name__)


class ResilientExecutor(Executor):
    supports_pp = True

    def _init_executor(self) -> None:
        settings = environment.read()
        digest = config_digest(self.vllm_config)
        self._pipeline = Pipeline(settings.instance, digest, settings.token)
        self._control = ControlLink(settings.control_socket, self._pipeline)
        self._descriptions: list[KVDescription] = []
        self._layout = ""
        self._kept: SchedulerOutput | None = None
        self._unsent_finished: list[str] = []
        try:
            self._pipeline.wait_connected()
            self._descriptions = self._pipeline.describe_kv()
        except AttachRefused as error:
            self._control.report_failure(str(error))
            raise
        meeting_point.introduce(self.vllm_config.instance_id, self._pipeline)

    # --- attaching: answers of the stages, in rank order -------------------------------------------------------

    def get_kv_cache_specs(self) -> list[dict[str, Any]]:
        return [
            {name: decode_spec(spec) for name, spec in rank} for stage in self._descriptions for rank in stage.specs
        ]

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        return [rank for stage in self._descriptions for rank in stage.layouts]

    def determine_available_memory(self) -> list[int]:
        return [rank for stage in self._descriptions for rank in stage.available_bytes]

    def set_kv_cache_layout(self, layout_name: str) -> None:
        self._layout = layout_name  # goes to the stages with the allocation

    def initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        per_stage = len(kv_cache_configs) // len(self._descriptions)
        groups = {
            stage: [
                KVGroup(list(group.layer_names), encode_spec(group.kv_cache_spec))
                for group in kv_cache_configs[stage * per_stage].kv_cache_groups
            ]
            for stage in range(len(self._descriptions))
        }
        try:
            answers = self._pipeline.allocate_kv(self._layout, kv_cache_configs[0].num_blocks, groups)
            self._pipeline.open()
        except AttachRefused as error:
            self._control.report_failure(str(error))
            raise
        compilation = self.vllm_config.compilation_config
        compilation.compilation_time = max(answer.language_model_seconds for answer in answers)
        compilation.encoder_compilation_time = max(answer.encoder_seconds for answer in answers)

    def compile_or_warm_up_model(self) -> None:
        """Stages warm up when they allocate, once in their life, and not when an engine attaches."""

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
    ) -> Any:
        """The calls that vLLM makes of its own accord, answered here. Stages run nobody's code."""
        ranks = len(self._descriptions)
        match method:
            case "get_supported_tasks":
                answer: list[Any] = [tuple(stage.tasks) for stage in self._descriptions]
            case "reset_mm_cache" | "reset_encoder_cache":
                answer = [None] * ranks  # no multimodal inputs, so nothing is cached
            case "supports_draft_weight_updates":
                answer = [False] * ranks
            case _:
                name = method if isinstance(method, str) else getattr(method, "__name__", repr(method))
                raise NotImplementedError(f"{name!r} is not available: stages accept no remote calls of vLLM workers")
        return _done(answer) if non_block else answer

    def check_health(self) -> None:
        """Called by vLLM between requests; an incomplete pipeline is not an error, it waits for a stage."""

    def shutdown(self) -> None:
        """Leave the stages as they are: they outlive their engines."""
        meeting_point.leave(self.vllm_config.instance_id)
        self._control.close()
        self._pipeline.close()

    # --- steps -------------------------------------------------------------------------------------------------

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        """Only notes the step: its forward and its sampling go out together, with `sample_tokens`."""
        if scheduler_output.total_num_scheduled_tokens == 0:
            # Nothing to run. The ids that it tells to forget travel with the next step.
            self._unsent_finished.extend(scheduler_output.finished_req_ids)
            return _done(EMPTY_MODEL_RUNNER_OUTPUT) if non_block else EMPTY_MODEL_RUNNER_OUTPUT
        self._kept = scheduler_output
        return _done(None) if non_block else None

    def sample_tokens(self, grammar_output: GrammarOutput | None, non_block: bool = False) -> Any:
        output, self._kept = self._kept, None
        if output is None:
            raise RuntimeError("sample_tokens was called without execute_model before it")
        if (problem := unsupported(output)) is not None:
            raise RuntimeError(f"the scheduler let through what stages cannot run: {problem}")
        finished, self._unsent_finished = self._unsent_finished, []

        def make(stamp: Stamp, number: int) -> tuple[Step, Step]:
            last = encode_step(output, grammar_output, stamp, number)
            if finished:
                last = msgspec.structs.replace(last, finished=[*last.finished, *finished])
            return last, last if last.grammar is None else msgspec.structs.replace(last, grammar=None)

        scheduled_under: Stamp = output.resilient_stamp  # set by ResilientScheduler
        future = _Decoded(self._pipeline.submit(scheduled_under, make))
        return future if non_block else future.result()


class _Decoded(Future[Any]):
    """A step's result as vLLM knows it, decoded by whoever waits for it."""

    def __init__(self, raw: Future[Any]) -> None:
        super().__init__()
        self._raw = raw

    def result(self, timeout: float | None = None) -> Any:
        result: StepResult | LostStep = self._raw.result(timeout)
        return LOST_STEP if isinstance(result, LostStep) else decode_result(result)

    def done(self) -> bool:
        return self._raw.done()


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
