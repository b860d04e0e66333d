"""Seam: where a model's weights come from, and their memory.

Relies on
- ``register_model_loader`` and the order of `BaseModelLoader.load_model` (vllm/model_executor/model_loader): the model
  is built, ``load_weights`` fills it, and ``process_weights_after_loading`` lays it out for its kernels;
- ``weights_already_processed`` and ``supports_pre_processed_weights``, vLLM's own contract for weights that come laid
  out already: a layer that declares it makes only what is not a tensor;
- on a CPU, that unquantised layers are packed into memory of oneDNN's own, out of reach, and that the tensors that they
  are packed from stay as they were.

So what one stage gives to another is on a GPU the model as it is after loading, and on a CPU the tensors as they were
loaded, which a stage that lends them has to keep beside the packed ones. Either way both sides list the same tensors:
those of a model that was just built, and the giver's. Where laying out changes names, shapes or types, the lists
differ, and weights come from storage. Layers that lay out in a way that this does not cover are refused by name.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from resilientllm_worker.protocol.messages import TensorHeader
from resilientllm_worker.seams.errors import Unsupported
from resilientllm_worker.seams.launch import config_digest
from resilientllm_worker.weights.runs import RUN_BYTES, Run

if TYPE_CHECKING:
    from torch import nn
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

FORMAT = "resilientllm"
"""The load format under which vLLM finds our loader."""


class ModelWeights:
    """Every parameter and buffer of a model, tied ones once, non-persistent ones too. A `WeightMemory`.

    Holds on to the tensors that there are now, whatever the model does with its own names for them.
    """

    def __init__(self, model: nn.Module) -> None:
        """Raises `Unsupported` for a model whose tensors are not all that there is to know, or no plain memory."""
        _check_layers(model)
        self.tensors: list[TensorHeader] = []
        self._flat: list[torch.Tensor] = []
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            plain = tensor.detach().data
            if type(plain) is not torch.Tensor or plain.is_meta or not plain.is_contiguous():
                raise Unsupported(f"{name} is no plain contiguous tensor")
            flat = plain.view(-1).view(torch.uint8)
            self.tensors.append(
                TensorHeader(name, str(plain.dtype).removeprefix("torch."), tuple(plain.shape), flat.numel())
            )
            self._flat.append(flat)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def mover(self) -> _Mover:
        return _Mover(self._flat)


class _Mover:
    """A tensor in host memory is read where it lies, one on a device over pinned memory and a stream of its own."""

    def __init__(self, flat: list[torch.Tensor]) -> None:
        self._flat = flat
        self._staging: torch.Tensor | None = None
        self._stream: Any = None
        device = next((tensor.device for tensor in flat if tensor.device.type != "cpu"), None)
        if device is not None:
            self._stream = torch.cuda.Stream(device)
            # A model that was just built may still be written: a parameter of zeros is.
            self._stream.wait_stream(torch.cuda.default_stream(device))

    def read(self, run: Run) -> memoryview:
        part = self._part(run)
        if part.device.type == "cpu":
            return memoryview(part.numpy())
        staged = self._staged(run.nbytes)
        with torch.cuda.stream(self._stream):
            staged.copy_(part, non_blocking=True)
        self._stream.synchronize()
        return memoryview(staged.numpy())

    def landing(self, nbytes: int) -> memoryview:
        return memoryview(self._staged(nbytes).numpy())

    def write(self, run: Run, content: memoryview) -> None:
        part = self._part(run)
        if part.device.type == "cpu":
            # NumPy starts no threads of its own beside those that serve on this machine.
            np.copyto(part.numpy(), np.frombuffer(content, np.uint8))
            return
        with torch.cuda.stream(self._stream):
            part.copy_(torch.frombuffer(content, dtype=torch.uint8), non_blocking=True)
        self._stream.synchronize()

    def _part(self, run: Run) -> torch.Tensor:
        return self._flat[run.tensor][run.offset : run.offset + run.nbytes]

    def _staged(self, nbytes: int) -> torch.Tensor:
        if self._staging is None:
            self._staging = torch.empty(RUN_BYTES, dtype=torch.uint8, pin_memory=self._stream is not None)
        return self._staging[:nbytes]


@dataclass
class Loading:
    """What is known of the loading of this rank's weights; complete when `Model.load` has returned."""

    seconds: float = 0.0
    """From a model without weights to one with: reading or receiving them, and no more."""
    nbytes: int = 0
    lent: ModelWeights | None = None
    """What can be given to others, if that was asked for."""
    refusal: str = ""
    """Why this model's weights can neither be taken nor given."""


def install(config: VllmConfig, fill: Callable[[ModelWeights], bool] | None, lend: bool) -> Loading:
    """Have the model of ``config`` loaded by us: by ``fill``, and by vLLM's loader if that returns False.

    ``fill`` is not asked for a model whose weights it could not fill. What it wrote before it gave up has to be right;
    vLLM's loader then writes the same, or the rest.
    """
    from vllm.model_executor.model_loader import BaseModelLoader, get_model_loader, register_model_loader
    from vllm.model_executor.utils import weights_already_processed
    from vllm.platforms import current_platform

    loading = Loading()
    stock = get_model_loader(config.load_config)
    as_loaded = current_platform.is_cpu()
    # Some of vLLM's loaders do it all themselves.
    whole = type(stock).load_model is not BaseModelLoader.load_model

    def memory_of(model: nn.Module) -> ModelWeights | None:
        try:
            return ModelWeights(model)
        except Unsupported as error:
            loading.refusal = str(error)
            return None

    class Loader(BaseModelLoader):
        _context: contextlib.ExitStack

        def download_model(self, model_config: Any) -> None:
            stock.download_model(model_config)

        def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
            if whole:
                loading.refusal = f"--load-format {stock.load_config.load_format} lays the model out by itself"
                started = time.monotonic()
                model = stock.load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
                loading.seconds = time.monotonic() - started
                return model
            with contextlib.ExitStack() as self._context:
                model = super().load_model(vllm_config, model_config, prefix)
            if lend and not as_loaded:
                loading.lent = memory_of(model)
            return model

        def load_weights(self, model: nn.Module, model_config: Any) -> None:
            memory = memory_of(model) if fill is not None or (lend and as_loaded) else None
            started = time.monotonic()
            if fill is not None and memory is not None and fill(memory):
                if not as_loaded:
                    self._context.enter_context(weights_already_processed())
            else:
                stock.load_weights(model, model_config)
            loading.seconds = time.monotonic() - started
            loading.nbytes = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
            if lend and as_loaded:
                loading.lent = memory

    register_model_loader(FORMAT)(Loader)
    config.load_config = copy.copy(config.load_config)
    config.load_config.load_format = FORMAT
    return loading


def weights_digest(config: VllmConfig, stage: int, rank: int) -> str:
    """Equal where two ranks' weights are the same after loading, as JSON like `config_digest`, of which it is more.

    Take it before the model is built, which may write into the configuration.
    """
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability()
    return json.dumps(
        {
            **json.loads(config_digest(config)),
            "stage": stage,
            "rank": rank,
            "device": current_platform.device_type,
            "capability": list(capability) if capability is not None else None,
            "architectures": config.model_config.architectures,
            "load_format": str(config.load_config.load_format),
        },
        sort_keys=True,
    )


def _check_layers(model: nn.Module) -> None:
    """Raises `Unsupported` if the tensors of a layer do not say all of its weights."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
    from vllm.platforms import current_platform

    packed_aside = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    on_cpu = current_platform.is_cpu()
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if not isinstance(method, QuantizeMethodBase):
            continue
        fits = type(method) in packed_aside if on_cpu else method.supports_pre_processed_weights
        if not fits:
            raise Unsupported(f"layer {name}: {type(method).__name__} does not take weights that another laid out")
