"""Seam: vLLM's V2 model runner (the default on GPUs).

V2 takes resumed requests as new ones with all their tokens, and its sampling noise is a hash of seed and position, so
nothing needs to be rebuilt here. But with pipeline parallelism it broadcasts sampled tokens from the last stage over a
communicator of all stages (vllm/v1/worker/gpu/pp_utils.py), which would never complete once a stage is dead. Without
asynchronous scheduling the broadcast is not needed: a request is scheduled again only after its token was processed,
and the scheduler sends that token with the next step.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput

TENANTS = 2
"""A stage serves its home and one guest, each with its own batches in flight."""


class RunnerV2:
    def before_construction(self, config: VllmConfig) -> None:
        import vllm.v1.worker.gpu.model_runner as module
        from vllm.v1.worker.gpu.buffer_utils import set_default_max_concurrency

        module.PPHandler = TokensFromScheduler
        # Buffers in flight are a ring, one slot a step. The constructor sizes it for one engine's steps; a ring that
        # is too short corrupts silently on a GPU.
        module.set_default_max_concurrency = lambda steps: set_default_max_concurrency(TENANTS * steps)

    def after_allocation(self, runner: Any) -> None:
        pass

    def prepare(self, runner: Any, output: SchedulerOutput) -> SchedulerOutput:
        if runner.pp_handler is not None:
            runner.pp_handler.offer(output.scheduled_cached_reqs, runner.req_states)
        return output

    def before_sampling(self, runner: Any) -> None:
        pass

    def knows_rows(self, runner: Any) -> bool:
        return True

    def row_order(self, runner: Any, tokens: dict[str, int]) -> list[str]:
        from vllm.v1.worker.gpu.model_runner import sort_batch_req_ids

        return sort_batch_req_ids(tokens, {}, runner.decode_query_len)

    def requests(self, runner: Any) -> Collection[str]:
        return tuple(runner.req_states.req_id_to_index)


class TokensFromScheduler:
    """Takes the place of V2's ``PPHandler``: tokens come with the step that needs them, not by broadcast."""

    def __init__(self, max_num_reqs: int, num_speculative_steps: int, device: torch.device) -> None:
        from vllm.distributed.parallel_state import get_pp_group

        if num_speculative_steps:
            raise RuntimeError("speculative decoding is not supported across stages")
        self.is_last_rank = get_pp_group().is_last_rank
        self.device = device
        self._offered: dict[str, torch.Tensor] | None = None

    def offer(self, cached: CachedRequestData, states: Any) -> None:
        """Note the tokens that this step's decoding requests sampled before. The last stage has them already."""
        self._offered = None
        if self.is_last_rank or not cached.req_ids:
            return
        slots: list[int] = []
        tokens: list[int] = []
        for request, computed, new in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_token_ids, strict=True
        ):
            slot = states.req_id_to_index[request]
            if computed >= states.prefill_len.np[slot]:
                slots.append(slot)
                tokens.append(new[-1])
        if slots:
            count = len(slots)
            ones = torch.ones(count, dtype=torch.int32, device=self.device)
            self._offered = {
                "idx_mapping": torch.tensor(slots, dtype=torch.int32, device=self.device),
                "sampled_tokens": torch.tensor(tokens, dtype=torch.int64, device=self.device).unsqueeze(1),
                "num_sampled": ones,
                "num_rejected": torch.zeros_like(ones),
            }

    # What V2 calls:

    def on_req_idx_freed(self, req_idx: int) -> None:
        """Nothing is pending for a slot beyond the step at hand."""

    def configure_aux_hidden_state_relay(self, model: torch.nn.Module) -> None:
        raise RuntimeError("auxiliary hidden states are not supported across stages")

    def relay_aux_hidden_states(self, received: Any, produced: Any) -> Any:
        return produced

    def get_prev_sampled_outputs(
        self, draft_tokens_to_update: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor] | None:
        offered, self._offered = self._offered, None
        return offered

    def receive(self, input_batch: Any) -> bool:
        """Whether every request of the batch will sample a token (same meaning as in vLLM)."""
        from vllm.v1.worker.gpu.pp_utils import compute_need_sampled_mask

        mask: np.ndarray[Any, Any] | None = compute_need_sampled_mask(input_batch)
        return mask is not None and bool(mask.all())

    def broadcast(self, sampled_token_ids: Any, num_sampled: Any, num_rejected: Any, input_batch: Any) -> None:
        """The engine gets the tokens anyway, and sends them with the next step."""

    def broadcast_drafts(self, draft_tokens: Any, input_batch: Any) -> None:
        raise RuntimeError("speculative decoding is not supported across stages")
