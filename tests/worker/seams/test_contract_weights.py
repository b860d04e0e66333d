"""A model that a twin filled is the one that storage would have made, as vLLM builds, loads and lays out models."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from resilientllm_worker.protocol.messages import TensorHeader
from resilientllm_worker.seams.errors import Unsupported
from resilientllm_worker.seams.weights import FORMAT, Loading, ModelWeights, install, weights_digest
from resilientllm_worker.weights.runs import RUN_BYTES, Run, runs
from torch import nn

from tests.worker.conftest import FLAGS
from tests.worker.seams.vllm_source import source_of

LOADER = "model_executor/model_loader/base_loader.py"
Fill = Callable[[ModelWeights], bool]


@pytest.fixture(scope="module")
def config(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of a single stage, in a world of one rank."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_USE_V2_MODEL_RUNNER": "0",
        }.items():
            environment.setenv(name, value)
        from resilientllm_worker.seams.launch import make_config, make_parser, prepare
        from vllm.config import set_current_vllm_config
        from vllm.distributed import parallel_state

        flags = FLAGS | {"--pipeline-parallel-size": "1"}
        args: Any = make_parser("test", "").parse_args(
            [str(tiny_model), *(word for flag in flags.items() for word in flag)]
        )
        prepare(args)
        made = make_config(args)
        meeting = tmp_path_factory.mktemp("world") / "store"
        with set_current_vllm_config(made):
            parallel_state.init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
            parallel_state.initialize_model_parallel(1, 1)
            yield made
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


def load(config: Any, fill: Fill | None = None, lend: bool = False) -> tuple[nn.Module, Loading]:
    """As a model runner does it."""
    from vllm.model_executor.model_loader import get_model

    own = copy.copy(config)
    own.compilation_config = copy.deepcopy(config.compilation_config)  # every attention layer enters its name there
    loading = install(own, fill, lend)
    return get_model(vllm_config=own), loading


def copied_from(giver: Loading) -> Fill:
    """What a transfer does, without a network."""

    def fill(memory: ModelWeights) -> bool:
        assert giver.lent is not None
        assert memory.tensors == giver.lent.tensors
        source, target = giver.lent.mover(), memory.mover()
        for run in runs(memory.tensors):
            landing = target.landing(run.nbytes)
            landing[:] = source.read(run)
            target.write(run, landing)
        return True

    return fill


def outputs(model: Any) -> torch.Tensor:
    """Of all that is packed or not: embedding, the layers' matrices, norms, head."""
    with torch.inference_mode():
        hidden = model.model.embed_tokens(torch.arange(32))
        for layer in model.model.layers:
            normed = layer.input_layernorm(hidden)
            query = layer.self_attn.qkv_proj(normed)[0][:, : hidden.shape[1]]
            turned, _ = layer.self_attn.rotary_emb(torch.arange(32), query.contiguous(), query.contiguous())
            hidden = hidden + layer.mlp(layer.self_attn.o_proj(turned)[0])
        return model.compute_logits(model.model.norm(hidden))


@pytest.fixture(scope="module")
def from_storage(config: Any) -> tuple[nn.Module, Loading]:
    return load(config, lend=True)


def test_a_model_filled_by_a_twin_computes_the_same(config: Any, from_storage: tuple[nn.Module, Loading]) -> None:
    model, loading = from_storage
    taken, _ = load(config, fill=copied_from(loading))
    assert torch.equal(outputs(taken), outputs(model))
    assert outputs(model).abs().sum() > 0


def test_nothing_of_it_is_read_from_storage(
    config: Any, from_storage: tuple[nn.Module, Loading], tiny_model: Path
) -> None:
    model, loading = from_storage
    file = tiny_model / "model.safetensors"
    hidden = file.rename(tiny_model / "elsewhere")
    try:
        taken, _ = load(config, fill=copied_from(loading))
        with pytest.raises(Exception, match="weights"):
            load(config)
    finally:
        hidden.rename(file)
    assert torch.equal(outputs(taken), outputs(model))


def test_a_twin_that_was_filled_by_a_twin_can_fill_the_next(
    config: Any, from_storage: tuple[nn.Module, Loading]
) -> None:
    model, loading = from_storage
    _, second = load(config, fill=copied_from(loading), lend=True)
    third, _ = load(config, fill=copied_from(second))
    assert torch.equal(outputs(third), outputs(model))


def test_what_a_twin_left_unfinished_storage_finishes(config: Any, from_storage: tuple[nn.Module, Loading]) -> None:
    model, loading = from_storage
    assert loading.lent is not None
    half = list(runs(loading.lent.tensors))[::2]
    source = loading.lent.mover()

    def fill(memory: ModelWeights) -> bool:
        for run in half:
            memory.mover().write(run, source.read(run))
        return False

    mixed, _ = load(config, fill=fill)
    assert torch.equal(outputs(mixed), outputs(model))


def test_what_is_lent_is_all_that_there_is_and_as_it_was_loaded(from_storage: tuple[nn.Module, Loading]) -> None:
    model, loading = from_storage
    lent = loading.lent
    assert lent is not None
    names = [tensor.name for tensor in lent.tensors]
    assert set(dict(model.named_parameters())) <= set(names)
    assert "model.layers.0.self_attn.rotary_emb.cos_sin_cache" in names, "a buffer that no checkpoint has"
    assert all(tensor.nbytes for tensor in lent.tensors), "packed layers drop their tensors, and what is lent stays"
    assert loading.nbytes == lent.nbytes > 1 << 20
    assert loading.seconds > 0


def test_a_stage_that_does_not_lend_keeps_nothing(config: Any) -> None:
    _, loading = load(config)
    assert loading.lent is None


def test_a_loader_that_does_it_all_itself_is_left_alone(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.model_loader import DefaultModelLoader

    asked: list[str] = []

    def load_model(self: Any, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        asked.append(prefix)
        return nn.Linear(2, 2)

    monkeypatch.setattr(DefaultModelLoader, "load_model", load_model)
    model, loading = load(config, fill=lambda memory: pytest.fail("asked"), lend=True)
    assert isinstance(model, nn.Linear) and asked == [""]
    assert loading.lent is None and "lays the model out by itself" in loading.refusal


def test_a_layer_that_lays_out_in_a_way_of_its_own_is_refused_and_storage_is_used(
    config: Any, from_storage: tuple[nn.Module, Loading], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    class Repacked(UnquantizedLinearMethod):
        pass

    model, giver = from_storage
    assert giver.lent is not None
    for layer in model.modules():
        if type(getattr(layer, "quant_method", None)) is UnquantizedLinearMethod:
            monkeypatch.setattr(layer, "quant_method", Repacked())
    with pytest.raises(Unsupported, match=r"layer model\.layers\.0\.self_attn\.qkv_proj: Repacked"):
        ModelWeights(model)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, dtype=torch.bfloat16), requires_grad=False)
        self.tied = self.weight
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("cache", torch.randn(7), persistent=False)
        self.register_buffer("nothing", torch.empty(0))
        self.register_buffer("absent", None)


def test_every_parameter_and_buffer_is_there_once() -> None:
    assert ModelWeights(Layers()).tensors == [
        TensorHeader("weight", "bfloat16", (3, 5), 30),
        TensorHeader("scale", "float32", (), 4),
        TensorHeader("mask", "bool", (3,), 3),
        TensorHeader("cache", "float32", (7,), 28),
        TensorHeader("nothing", "float32", (0,), 0),
    ]


def test_what_is_written_is_what_was_read() -> None:
    source, target = Layers(), Layers()
    weights = ModelWeights(source)
    reader, writer = weights.mover(), ModelWeights(target).mover()
    for place, tensor in enumerate(weights.tensors):
        for offset in range(0, tensor.nbytes, 3):
            run = Run(place, offset, min(3, tensor.nbytes - offset))
            writer.write(run, reader.read(run))
    for name, tensor in source.state_dict(keep_vars=True).items():
        assert torch.equal(dict(target.state_dict(keep_vars=True))[name], tensor)
    assert torch.equal(target.cache, source.cache)
    assert len(writer.landing(RUN_BYTES)) == RUN_BYTES


@pytest.mark.parametrize("strange", [torch.zeros(4, 4).t()[1:], torch.zeros(2, 2, device="meta")], ids=["view", "meta"])
def test_what_is_no_plain_memory_is_refused(strange: torch.Tensor) -> None:
    model = Layers()
    model.register_buffer("strange", strange)
    with pytest.raises(Unsupported, match="strange"):
        ModelWeights(model)


def test_the_digest_names_what_decides_about_weights(config: Any) -> None:
    digests = {weights_digest(config, stage, rank) for stage in (0, 1) for rank in (0, 1)}
    assert len(digests) == 4
    other = copy.copy(config)
    other.load_config = copy.copy(config.load_config)
    other.load_config.load_format = "dummy"
    assert weights_digest(other, 0, 0) != weights_digest(config, 0, 0)


def test_vllm_still_loads_in_the_order_that_we_rely_on() -> None:
    source = source_of(LOADER, "BaseModelLoader", "load_model")
    steps = ("self.create_model(", "self.load_weights(model, model_config)", "process_weights_after_loading(model,")
    places = [source.find(step) for step in steps]
    assert -1 not in places and places == sorted(places), (
        "vLLM builds, loads and lays out models in another order: look at seams/weights.py"
    )


def test_vllm_still_knows_weights_that_are_laid_out_already() -> None:
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.model_loader import utils
    from vllm.model_executor.utils import is_weights_pre_processed, weights_already_processed

    assert QuantizeMethodBase.supports_pre_processed_weights is False, "a layer must declare it"
    with weights_already_processed():
        assert is_weights_pre_processed()
    assert not is_weights_pre_processed()
    assert "supports_pre_processed_weights" in inspect.getsource(utils.process_weights_after_loading)


def test_our_format_is_no_name_of_vllms() -> None:
    from vllm.model_executor.model_loader import LoadFormats

    assert FORMAT not in LoadFormats.__args__
