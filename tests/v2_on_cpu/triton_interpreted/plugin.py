"""What vLLM needs changed to run interpreted kernels; vLLM calls `install` in each of its processes."""

import inspect
import os
import threading
from typing import Any


def install() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    _sample_without_triton()
    _launch_one_at_a_time()
    _patch_language_once()


def _sample_without_triton() -> None:
    """The top-k/top-p kernel does not run in the interpreter; vLLM has the same in torch."""
    import vllm.v1.sample.ops.topk_topp_sampler as sampler

    sampler.HAS_TRITON = False


def _launch_one_at_a_time() -> None:
    """The interpreter keeps the grid position in globals. On a CPU its copies of the arguments are not needed."""
    from triton.runtime import interpreter

    executor = interpreter.GridExecutor
    if hasattr(executor, "resilientllm_lock"):
        return
    executor.resilientllm_lock = threading.RLock()
    executor._init_args_hst = lambda self, args, kwargs: (list(args), dict(kwargs))
    executor._restore_args_dev = lambda self, *args: None
    stock = executor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with executor.resilientllm_lock:
            return stock(self, *args, **kwargs)

    executor.__call__ = call


def _patch_language_once() -> None:
    """The interpreter patches triton.language for each launch and restores it after; nothing here needs it restored."""
    import triton.language as language
    from triton.runtime import interpreter

    if hasattr(interpreter, "resilientllm_patched"):
        return
    patched: set[tuple[str, ...]] = set()
    interpreter.resilientllm_patched = patched
    stock = interpreter._patch_lang

    class Kept:
        def restore(self) -> None:
            """Stays patched."""

    def patch(function: Any) -> Kept:
        modules = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        key = tuple(
            name for name, module in (("tl", language), ("core", language.core)) if any(m is module for m in modules)
        )
        if key not in patched:
            stock(function)
            patched.add(key)
        return Kept()

    interpreter._patch_lang = patch
