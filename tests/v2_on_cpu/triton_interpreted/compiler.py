"""What Triton asks of a backend's compiler. There is nothing to compile to."""

from typing import Any, NoReturn

from triton.backends.compiler import BaseBackend, GPUTarget


def _refuse(self: object, *args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        "this Triton backend only lets kernels be interpreted: set TRITON_INTERPRET=1 before importing Triton"
    )


def _stub_out(backend: type[Any]) -> type[Any]:
    """Every abstract method refuses, whichever this Triton has."""
    for name in backend.__abstractmethods__ - {"supports_target"}:
        setattr(backend, name, _refuse)
    backend.__abstractmethods__ = frozenset()
    return backend


@_stub_out
class InterpretedBackend(BaseBackend):
    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return bool(target.backend == "cpu")
