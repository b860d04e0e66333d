"""The vLLM objects that we carry field by field are still those that we know.

A failure here means that a new vLLM says something that our wire would drop. Read the new field's use in vLLM, teach
the module named below to carry it, to refuse it or to leave it out, and only then change the list.
"""

import dataclasses
import inspect

import pytest
from resilientllm_worker.seams.kv_cache_spec import ALLOWED_SPECS
from vllm.v1 import kv_cache_interface
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
from vllm.v1.core.sched.output import CachedRequestData, GrammarOutput, NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.outputs import LogprobsLists, LogprobsTensors, ModelRunnerOutput

KV_CACHE_SPEC = "block_size dcp_sharded block_stride_alignment"
ATTENTION_SPEC = f"""{KV_CACHE_SPEC} max_tp_shards num_kv_heads head_size dtype head_size_v kv_quant_mode
    page_size_padded num_head_slots state_content_bytes tokens_per_state"""
FULL_SPEC = f"{ATTENTION_SPEC} sliding_window attention_chunk_size non_causal"
SLIDING_SPEC = f"{ATTENTION_SPEC} sliding_window extra_retained_tokens"

KNOWN: dict[type, tuple[str, str]] = {
    SchedulerOutput: (
        "seams/scheduler_output.py",
        """scheduled_new_reqs scheduled_cached_reqs num_scheduled_tokens total_num_scheduled_tokens
        scheduled_spec_decode_tokens scheduled_encoder_inputs finished_req_ids free_encoder_mm_hashes
        scheduled_encoder_input_stats preempted_req_ids has_structured_output_requests
        pending_structured_output_tokens num_invalid_spec_tokens kv_connector_metadata has_sync_kv_loads
        aux_output_connector_metadata ec_connector_metadata ec_manager_metadata new_block_ids_to_zero
        kv_cache_block_copies kv_connector_block_state num_spec_tokens_to_schedule num_common_prefix_blocks""",
    ),
    NewRequestData: (
        "seams/scheduler_output.py",
        """req_id prompt_token_ids mm_features sampling_params pooling_params block_ids num_computed_tokens lora_request
        prompt_embeds prompt_is_token_ids prefill_token_ids replay_start""",
    ),
    CachedRequestData: (
        "seams/scheduler_output.py",
        """req_ids resumed_req_ids new_token_ids all_token_ids new_block_ids num_computed_tokens num_output_tokens""",
    ),
    GrammarOutput: (
        "seams/scheduler_output.py",
        "structured_output_request_ids grammar_bitmask num_acceptable_drafts",
    ),
    KVCacheBlockCopy: ("seams/scheduler_output.py", "src_block_id dst_block_id"),
    ModelRunnerOutput: (
        "seams/model_output.py",
        """req_ids req_id_to_index sampled_token_ids logprobs prompt_logprobs_dict prompt_token_id_logprobs_dict
        pooler_output kv_connector_output ec_connector_output num_nans_in_logits cudagraph_stats
        aux_output_connector_output sampling_masks""",
    ),
    LogprobsLists: (
        "seams/model_output.py",
        "logprob_token_ids logprobs sampled_token_ranks cu_num_generated_tokens",
    ),
    LogprobsTensors: (
        "seams/model_output.py",
        """logprob_token_ids logprobs selected_token_ranks cu_num_generated_tokens cu_num_generated_tokens_tensor""",
    ),
    kv_cache_interface.FullAttentionSpec: ("seams/kv_cache_spec.py", FULL_SPEC),
    kv_cache_interface.MLAAttentionSpec: (
        "seams/kv_cache_spec.py",
        f"""{FULL_SPEC} cache_dtype_str alignment model_version cache_role is_index_group_leader
        non_causal_multi_token_decode""",
    ),
    kv_cache_interface.RSWASpec: ("seams/kv_cache_spec.py", f"{FULL_SPEC} rswa_window"),
    kv_cache_interface.SinkFullAttentionSpec: ("seams/kv_cache_spec.py", f"{FULL_SPEC} sink_len"),
    kv_cache_interface.ChunkedLocalAttentionSpec: ("seams/kv_cache_spec.py", f"{ATTENTION_SPEC} attention_chunk_size"),
    kv_cache_interface.SlidingWindowSpec: ("seams/kv_cache_spec.py", SLIDING_SPEC),
    kv_cache_interface.SlidingWindowMLASpec: (
        "seams/kv_cache_spec.py",
        f"{SLIDING_SPEC} cache_dtype_str alignment model_version bounded_replay",
    ),
    kv_cache_interface.MambaSpec: (
        "seams/kv_cache_spec.py",
        f"""{KV_CACHE_SPEC} shapes dtypes page_size_padded mamba_type mamba_cache_mode num_speculative_blocks
        num_prefill_checkpoint_blocks prefill_checkpoint_alignment num_heads tokens_per_state tp_replicated""",
    ),
    kv_cache_interface.UniformTypeKVCacheSpecs: ("seams/kv_cache_spec.py", f"{KV_CACHE_SPEC} kv_cache_specs"),
}

REFUSED_SPECS = {
    "AttentionSpec",
    "CircularBufferSpec",
    "CrossAttentionSpec",
    "EncoderOnlyAttentionSpec",
    "HiSparseHotSpec",
    "HiSparseResidentSpec",
    "HiddenStateCacheSpec",
    "KVCacheSpec",
}


def fields_of(kind: type) -> set[str]:
    if dataclasses.is_dataclass(kind):
        return {field.name for field in dataclasses.fields(kind)}
    names: tuple[str, ...] = kind._fields  # type: ignore[attr-defined]
    return set(names)


@pytest.mark.parametrize("kind", KNOWN, ids=lambda kind: kind.__name__)
def test_vllm_has_the_fields_that_we_know(kind: type) -> None:
    where, known = KNOWN[kind]
    added, removed = fields_of(kind) - set(known.split()), set(known.split()) - fields_of(kind)
    assert not added and not removed, (
        f"vLLM's {kind.__name__} has changed: fields added {sorted(added)}, removed {sorted(removed)}. "
        f"Look at worker/src/resilientllm_worker/{where}"
    )


def test_every_kind_of_kv_cache_is_allowed_or_refused_on_purpose() -> None:
    found = {
        name
        for name, kind in inspect.getmembers(kv_cache_interface, inspect.isclass)
        if issubclass(kind, KVCacheSpec) and kind.__module__ == kv_cache_interface.__name__
    }
    known = REFUSED_SPECS | set(ALLOWED_SPECS)
    assert found == known, (
        f"vLLM's kinds of KV cache have changed: added {sorted(found - known)}, removed {sorted(known - found)}. "
        "Look at worker/src/resilientllm_worker/seams/kv_cache_spec.py"
    )


def test_every_allowed_spec_is_pinned() -> None:
    assert set(ALLOWED_SPECS.values()) <= set(KNOWN)
