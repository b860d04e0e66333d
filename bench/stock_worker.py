"""Stock vLLM's CPU worker, with the buffer that it lacks to run a pipeline at all.

vLLM's V1 runner makes the buffer for tensors from the previous stage in its first dummy run. A CPU worker without
compilation has no dummy run, and fails at its first step with ``assert self.intermediate_tensors is not None``. This
makes the same buffer after the weights are loaded; ``resilientllm-stage`` does so too (``seams/runner_v1.py``).
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.parallel_state import get_pp_group
from vllm.v1.worker.cpu_worker import CPUWorker


class Worker(CPUWorker):  # type: ignore[misc]
    def load_model(self, *arguments: Any, **options: Any) -> None:
        super().load_model(*arguments, **options)
        runner = self.model_runner
        if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.get_model().make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.dtype, device=runner.device
            )
