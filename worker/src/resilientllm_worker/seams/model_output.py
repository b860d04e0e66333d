"""vLLM's ModelRunnerOutput, to and from the wire's `StepResult`.

Made for vLLM 0.32; the contract tests pin every field. What no request that `seams.scheduler_output` lets through can
ask for is refused when it is there all the same. ``cudagraph_stats`` is dropped: it feeds a metric only.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.outputs import LogprobsLists, LogprobsTensors, ModelRunnerOutput

from resilientllm_worker.protocol.messages import Logprobs, Stamp, StepResult
from resilientllm_worker.seams.arrays import decode_array, encode_array
from resilientllm_worker.seams.errors import Malformed, Unsupported


def encode_result(model_runner_output: ModelRunnerOutput, stamp: Stamp, step: int) -> StepResult:
    """The result for the wire. Tensors must be on the CPU: resolve an async output first.

    Raises:
        Unsupported: the output holds what our wire cannot carry.
    """
    output = model_runner_output
    _refuse(output)
    logprobs = output.logprobs
    return StepResult(
        stamp=stamp,
        step=step,
        requests=output.req_ids,
        sampled_token_ids=output.sampled_token_ids,
        logprobs=(
            None
            if logprobs is None
            else Logprobs(
                token_ids=encode_array(logprobs.logprob_token_ids),
                logprobs=encode_array(logprobs.logprobs),
                ranks=encode_array(logprobs.sampled_token_ranks),
                offsets=logprobs.cu_num_generated_tokens,
            )
        ),
        prompt_logprobs=[
            (request, _encode_tensors(tensors))
            for request, tensors in output.prompt_logprobs_dict.items()
            if tensors is not None
        ],
        num_nans=None if output.num_nans_in_logits is None else list(output.num_nans_in_logits.items()),
    )


def decode_result(result: StepResult) -> ModelRunnerOutput:
    """The result for the scheduler's ``update_from_output``.

    Raises:
        Malformed: the parts contradict each other.
    """
    requests = result.requests
    index = {request: place for place, request in enumerate(requests)}
    if len(index) != len(requests):
        raise Malformed(f"step {result.step}: a request has two results")
    if len(result.sampled_token_ids) not in (0, len(requests)):
        raise Malformed(
            f"step {result.step}: expected tokens for {len(requests)} requests, found {len(result.sampled_token_ids)}"
        )
    return ModelRunnerOutput(
        req_ids=requests,
        req_id_to_index=index,
        sampled_token_ids=result.sampled_token_ids,
        logprobs=None if result.logprobs is None else _decode_lists(result.logprobs),
        prompt_logprobs_dict={request: _decode_tensors(logprobs) for request, logprobs in result.prompt_logprobs},
        num_nans_in_logits=None if result.num_nans is None else dict(result.num_nans),
    )


def _refuse(output: ModelRunnerOutput) -> None:
    """Raises `Unsupported` for what has no place on the wire."""
    for name in (
        "prompt_token_id_logprobs_dict",
        "pooler_output",
        "kv_connector_output",
        "ec_connector_output",
        "aux_output_connector_output",
        "sampling_masks",
    ):
        if not _says_nothing(getattr(output, name)):
            raise Unsupported(f"a step's output holds {name}, which our protocol does not carry")


def _says_nothing(value: Any) -> bool:
    """A runner fills some fields with empty containers, and with connectors' outputs that know that they are empty."""
    if value is None:
        return True
    return not value if isinstance(value, (list, dict)) else bool(getattr(value, "is_empty", bool)())


def _encode_tensors(tensors: LogprobsTensors) -> Logprobs:
    if tensors.cu_num_generated_tokens_tensor is not None:
        raise Unsupported("prompt logprobs with boundaries on the device (adaptive verification)")
    return Logprobs(
        token_ids=encode_array(tensors.logprob_token_ids.numpy()),
        logprobs=encode_array(tensors.logprobs.numpy()),
        ranks=encode_array(tensors.selected_token_ranks.numpy()),
        offsets=tensors.cu_num_generated_tokens,
    )


def _decode_tensors(logprobs: Logprobs) -> LogprobsTensors:
    lists = _decode_lists(logprobs)
    return LogprobsTensors(
        logprob_token_ids=torch.from_numpy(lists.logprob_token_ids),
        logprobs=torch.from_numpy(lists.logprobs),
        selected_token_ranks=torch.from_numpy(lists.sampled_token_ranks),
        cu_num_generated_tokens=lists.cu_num_generated_tokens,
    )


def _decode_lists(logprobs: Logprobs) -> LogprobsLists:
    token_ids, values = decode_array(logprobs.token_ids), decode_array(logprobs.logprobs)
    ranks = decode_array(logprobs.ranks)
    if token_ids.ndim != 2 or token_ids.shape != values.shape or ranks.shape != token_ids.shape[:1]:
        raise Malformed(
            f"expected logprobs [n, k], token ids [n, k] and ranks [n], "
            f"found {values.shape}, {token_ids.shape} and {ranks.shape}"
        )
    return LogprobsLists(token_ids, values, ranks, logprobs.offsets)
