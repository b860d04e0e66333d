"""What Triton asks of a backend's driver: which device it drives, and whether it is in use."""

import os
from typing import Any, NoReturn

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class InterpretedDriver(DriverBase):
    @classmethod
    def is_active(cls) -> bool:
        return os.environ.get("TRITON_INTERPRET") == "1"

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> NoReturn:
        raise NotImplementedError("nothing is compiled, so no argument needs a C++ type")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("interpreted kernels are not worth timing")
