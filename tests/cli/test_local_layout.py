"""From the user's numbers to programs: flags, ports, environment, and what is refused beforehand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from resilientllm_api.crd import WeightsSource
from resilientllm_api.plan import StageId
from resilientllm_cli.errors import UsageError
from resilientllm_cli.local import environment, flags, ports, preflight
from resilientllm_cli.local.layout import Layout, place, ports_needed, programs
from resilientllm_cli.local.preflight import ModelShape

SHAPE = ModelShape(layers=6, heads=4, max_model_len=2048)
LAYOUT = Layout(model=Path("tiny"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], ["--dtype", "float32", "--enforce-eager"]),
        (["--dtype", "bfloat16"], ["--enforce-eager", "--dtype", "bfloat16"]),
        (["--dtype=bfloat16"], ["--enforce-eager", "--dtype=bfloat16"]),
        (["--no-enforce-eager"], ["--dtype", "float32", "--no-enforce-eager"]),
        (["--seed", "1"], ["--dtype", "float32", "--enforce-eager", "--seed", "1"]),
    ],
)
def test_a_default_flag_is_added_only_where_the_user_gave_none(given: list[str], expected: list[str]) -> None:
    assert flags.with_defaults(given, {"--dtype": "float32", "--enforce-eager": None}) == expected


def test_underscores_in_flags_are_dashes() -> None:
    assert flags.with_defaults(["--block_size", "16"], {"--block-size": "32"}) == ["--block_size", "16"]


def test_the_default_context_is_no_longer_than_the_model_can() -> None:
    assert environment.default_flags(SHAPE, gpu=False)["--max-model-len"] == "2048"


def test_a_gpu_gets_vllms_own_defaults() -> None:
    assert environment.default_flags(SHAPE, gpu=True) == {}


def test_defaults_give_way_to_what_is_inherited_and_that_to_the_users_environment() -> None:
    inherited = {"OMP_NUM_THREADS": "4", "HF_HUB_OFFLINE": "0", "HOME": "/home/it"}
    found = environment.of_children(inherited, replace(LAYOUT, env={"HF_HUB_OFFLINE": "maybe"}), gpu=False)
    assert found["OMP_NUM_THREADS"] == "4"
    assert found["HF_HUB_OFFLINE"] == "maybe"
    assert found["HOME"] == "/home/it"
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_the_users_temporary_folder_is_not_handed_on_but_one_that_was_asked_for_is() -> None:
    assert "TMPDIR" not in environment.of_children({"TMPDIR": "/inherited"}, LAYOUT, gpu=False)
    asked = environment.of_children({}, replace(LAYOUT, env={"TMPDIR": "/asked"}), gpu=False)
    assert asked["TMPDIR"] == "/asked"


def test_what_was_compiled_outlives_a_process() -> None:
    found = environment.of_children({"XDG_CACHE_HOME": "/home/it/.cache"}, LAYOUT, gpu=False)
    assert found["TORCHINDUCTOR_CACHE_DIR"] == "/home/it/.cache/resilientllm/inductor"
    kept = environment.of_children({"TORCHINDUCTOR_CACHE_DIR": "/elsewhere"}, LAYOUT, gpu=False)
    assert kept["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"


@pytest.mark.parametrize(("runner", "v2", "interpreted"), [("v1", "0", None), ("v2", "1", "1")])
def test_the_runner_is_chosen_by_environment(runner: str, v2: str, interpreted: str | None) -> None:
    found = environment.of_children({}, replace(LAYOUT, runner=runner), gpu=False)
    assert found["VLLM_USE_V2_MODEL_RUNNER"] == v2
    assert found.get("TRITON_INTERPRET") == interpreted


def test_every_process_gets_addresses_of_its_own() -> None:
    endpoints = place(LAYOUT, "127.0.0.1", range(20_000, 20_000 + ports_needed(LAYOUT)))
    addresses = [address for at in endpoints.stages.values() for address in (at.address, at.health)]
    addresses += [at.control for at in endpoints.engines.values()] + [at.url for at in endpoints.engines.values()]
    assert len(set(addresses)) == len(addresses) == 4 * 2 + 2 + 2
    assert [at.url for at in endpoints.engines.values()] == ["http://127.0.0.1:8000", "http://127.0.0.1:8001"]


def test_port_zero_means_any() -> None:
    layout = replace(LAYOUT, port=0)
    endpoints = place(layout, "127.0.0.1", range(20_000, 20_000 + ports_needed(layout)))
    assert all(at.port >= 20_000 for at in endpoints.engines.values())


def test_programs_name_their_place_and_stop_engines_first() -> None:
    endpoints = place(LAYOUT, "127.0.0.1", range(20_000, 20_010))
    found = {
        program.name: program
        for program in programs(LAYOUT, endpoints, {"resilientllm-stage": "S", "resilientllm-engine": "E"}, ["--x"], {})
    }
    assert set(found) == {"stage-0.0", "stage-0.1", "stage-1.0", "stage-1.1", "engine-0", "engine-1"}
    stage = found["stage-1.0"]
    address = endpoints.stages[StageId(instance=1, stage=0)].address
    assert " ".join(stage.arguments).startswith(f"S tiny --instance 1 --stage 0 --listen {address} --health ")
    assert " ".join(stage.arguments).endswith("--pipeline-parallel-size 2 --tensor-parallel-size 1 --x")
    assert found["engine-0"].stop_order < stage.stop_order


def test_a_stage_is_told_of_its_twins_only_if_weights_are_to_come_from_them() -> None:
    layout = replace(LAYOUT, instances=3)
    endpoints = place(layout, "127.0.0.1", range(20_000, 20_000 + ports_needed(layout)))

    def words(weights: WeightsSource) -> list[str]:
        executables = {"resilientllm-stage": "S", "resilientllm-engine": "E"}
        found = programs(replace(layout, weights=weights), endpoints, executables, [], {})
        return [word for program in found if program.name == "stage-1.1" for word in program.arguments]

    twins = ",".join(endpoints.stages[StageId(instance=instance, stage=1)].address for instance in (0, 2))
    assert {"--lend-weights", f"--weights-from={twins}"} <= set(words(WeightsSource.TWIN))
    assert not [word for word in words(WeightsSource.STORAGE) if "weights" in word]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": 7}, "--stages must not exceed the model's 6 layers, found 7"),
        ({"stages": 0}, "--stages must be at least 1, found 0"),
        ({"instances": -1}, "--instances must be at least 1, found -1"),
        ({"tensor_parallel_size": 3}, "--tensor-parallel-size must divide the model's 4 attention heads, found 3"),
        ({"runner": "v3"}, "--runner must be one of v1, v2, found v3"),
    ],
)
def test_wrong_numbers_are_refused_with_what_was_expected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        preflight.check_layout(replace(LAYOUT, **change), SHAPE)


def test_a_taken_port_is_refused() -> None:
    with pytest.raises(UsageError, match="port 8001 is taken"):
        preflight.check_ports(LAYOUT, free=lambda port: port != 8001)


def test_a_port_without_room_for_all_engines_is_refused() -> None:
    with pytest.raises(UsageError, match="room for 2 ports"):
        preflight.check_ports(replace(LAYOUT, port=65_535), free=lambda port: True)


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found none at"):
        preflight.read_shape(tmp_path / "missing")
    with pytest.raises(UsageError, match=r"config\.json"):
        preflight.read_shape(tmp_path)


def test_a_broken_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="must be JSON"):
        preflight.read_shape(tmp_path)


def test_chosen_ports_are_free_and_distinct() -> None:
    assert ports.choose(2, [1, 2, 3, 4], free=lambda port: port % 2 == 0) == [2, 4]
    with pytest.raises(OSError, match="expected 2 free ports, found 1"):
        ports.choose(2, [1], free=lambda port: True)
