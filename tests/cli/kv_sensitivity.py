"""Runs a model in one vLLM process and spoils one block of KV a request. Prints JSON. A program of its own: vLLM takes
its environment at import.

Every request has the same prompt. Request 0 is left alone; of each other one, one block of one layer is spoiled when
all have ``BEFORE`` output tokens. All are in one batch, so nothing but that block sets them apart.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

BLOCK = 32
PROMPT = [(7 + 13 * place) % 256 for place in range(2 * BLOCK)]
BEFORE, AFTER = BLOCK + 8, 80
"""Three full blocks and a part of a fourth."""
BLOCKS = 3
LONG_PROMPTS = [[5], list(range(40, 80)), [97, 98, 99, 98] * 16, [(3 * i * i) % 256 for i in range(30)]]
"""Not one token over and over: where all values are the same, no attention can tell its steps apart."""
LONG = 300


def main(model: str) -> None:
    from vllm import LLM

    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        block_size=BLOCK,
        max_model_len=1024,
        max_num_seqs=64,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=128 * 2**20,
    )
    print(json.dumps({"long": long_outputs(llm), **spoiled_outputs(llm.llm_engine)}))


def long_outputs(llm: Any) -> list[list[int]]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=LONG, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in LONG_PROMPTS]
    return [list(result.outputs[0].token_ids) for result in llm.generate(prompts, sampling, use_tqdm=False)]


def spoiled_outputs(engine: Any) -> dict[str, Any]:
    """``undisturbed``: its output after ``BEFORE`` tokens. ``spoiled``: the others', by what was done to them."""
    core = engine.engine_core.engine_core
    caches = core.model_executor.driver_worker.model_runner.kv_caches
    spoils = {
        f"{manner} block {block} of layer {layer}": (manner, layer, block)
        for manner in ("zero", "permute")
        for layer in range(len(caches))
        for block in range(BLOCKS)
    }
    request_ids = start(engine, ["undisturbed", *spoils])
    outputs: dict[str, list[int]] = {name: [] for name in request_ids}
    while min(map(len, outputs.values())) < BEFORE:
        step(engine, outputs)
    before = {name: len(tokens) for name, tokens in outputs.items()}
    assert len({tuple(tokens[:BEFORE]) for tokens in outputs.values()}) == 1
    for name, (manner, layer, block) in spoils.items():
        [block_ids] = core.scheduler.kv_cache_manager.get_block_ids(request_ids[name])
        spoil(caches[layer], core.scheduler.cache_config.num_gpu_blocks, block_ids[block], manner)
    while engine.has_unfinished_requests():
        step(engine, outputs)
    assert len(set(before.values())) == 1
    after = {name: tokens[BEFORE:] for name, tokens in outputs.items()}
    return {"undisturbed": after.pop("undisturbed"), "spoiled": after}


def start(engine: Any, names: list[str]) -> dict[str, str]:
    """The engine's own id of each request, by its name."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=BEFORE + AFTER, ignore_eos=True)
    return {name: engine.add_request(name, {"prompt_token_ids": PROMPT}, sampling) for name in names}


def step(engine: Any, outputs: dict[str, list[int]]) -> None:
    for result in engine.step():
        outputs[result.request_id] = list(result.outputs[0].token_ids)


def spoil(cache: Any, num_blocks: int, block: int, manner: str) -> None:
    """``permute`` keeps every value, and moves each token's KV by one place."""
    blocks = cache.movedim(list(cache.shape).index(num_blocks), 0)
    tokens_axis = list(blocks[block].shape).index(BLOCK)
    blocks[block] = 0 if manner == "zero" else blocks[block].roll(1, tokens_axis)


if __name__ == "__main__":
    main(sys.argv[1])
