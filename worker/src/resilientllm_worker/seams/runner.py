"""What differs between vLLM's two model runners, behind one interface.

The protocol speaks as V2 wants it: a request that is resumed, moved, or stepped back arrives as new with all its
tokens. `runner_v1` translates that for V1; `runner_v2` replaces V2's broadcast of sampled tokens.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput


class RunnerAdapter(Protocol):
    def before_construction(self, config: VllmConfig) -> None:
        """Runs before the worker builds its model runner."""

    def after_allocation(self, runner: Any) -> None:
        """Runs once the KV cache is there and the model is warm."""

    def prepare(self, runner: Any, output: SchedulerOutput) -> SchedulerOutput:
        """Make a decoded step fit this runner, just before it executes."""

    def before_sampling(self, runner: Any) -> None:
        """Runs between a step's forward and its sampling, on the last stage."""

    def knows_rows(self, runner: Any) -> bool:
        """Whether `row_order` can be told. Ask when the KV cache is there."""

    def row_order(self, runner: Any, tokens: dict[str, int]) -> list[str]:
        """The requests of a step, given with their numbers of tokens, in the order that their rows will have."""

    def requests(self, runner: Any) -> Collection[str]:
        """Ids of all requests that the runner holds state of."""


def adapter_for(config: VllmConfig) -> RunnerAdapter:
    if config.use_v2_model_runner:
        from resilientllm_worker.seams.runner_v2 import RunnerV2

        return RunnerV2()
    from resilientllm_worker.seams.runner_v1 import RunnerV1

    return RunnerV1()
