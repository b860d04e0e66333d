"""vLLM's flags: those of the user, and defaults where the user gave none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

CPU_DEFAULTS: Mapping[str, str | None] = {
    "--dtype": "float32",
    "--enforce-eager": None,
    "--block-size": "32",
    "--max-num-seqs": "16",
    "--max-num-batched-tokens": "2048",
    "--kv-cache-memory-bytes": str(128 * 2**20),
}
"""For a machine without a GPU: no compilation, and full precision, which leaves a random model's tokens alone however
requests are batched. vLLM touches all KV memory at the start, so eight processes must not take a GiB each; who sets
VLLM_CPU_KVCACHE_SPACE (in GiB) overrides it."""

CPU_ENVIRONMENT: Mapping[str, str] = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""Several processes share few cores: none may spin on all of them."""

QUIET_ENVIRONMENT: Mapping[str, str] = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
"""Local models only: nothing is reported, nothing is looked up."""


def canonical(flag: str) -> str:
    """``--block_size=32`` and ``--block-size`` are the same flag to vLLM; ``--no-x`` decides about ``--x``."""
    name = flag.split("=", 1)[0].replace("_", "-")
    return "--" + name.removeprefix("--no-") if name.startswith("--no-") else name


def with_defaults(flags: Sequence[str], defaults: Mapping[str, str | None]) -> list[str]:
    """``flags``, preceded by each default whose flag is not among them. A default of None is a switch."""
    given = {canonical(flag) for flag in flags if flag.startswith("--")}
    added: list[str] = []
    for flag, value in defaults.items():
        if flag not in given:
            added += [flag] if value is None else [flag, value]
    return [*added, *flags]
