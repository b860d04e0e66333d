"""What the last stage sampled is what the scheduler gets."""

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from resilientllm_worker.protocol.messages import Array, Logprobs, StepResult
from resilientllm_worker.seams.arrays import decode_array, encode_array
from resilientllm_worker.seams.errors import Malformed, Unsupported
from resilientllm_worker.seams.model_output import decode_result, encode_result
from vllm.v1.outputs import (
    EMPTY_MODEL_RUNNER_OUTPUT,
    KVConnectorOutput,
    LogprobsLists,
    LogprobsTensors,
    ModelRunnerOutput,
    SamplingMaskLists,
)

from tests.worker.seams.builders import STAMP, over_the_wire


def an_output(**changes: Any) -> ModelRunnerOutput:
    fields: dict[str, Any] = {
        "req_ids": ["a", "b"],
        "req_id_to_index": {"a": 0, "b": 1},
        "sampled_token_ids": [[5], []],
    }
    return ModelRunnerOutput(**fields | changes)


def carried(output: ModelRunnerOutput) -> ModelRunnerOutput:
    return decode_result(over_the_wire(encode_result(output, STAMP, 1)))


class TestAResult:
    @pytest.mark.parametrize(
        "output",
        [
            an_output(),
            an_output(num_nans_in_logits={"a": 0, "b": 3}),
            an_output(num_nans_in_logits={}),
            EMPTY_MODEL_RUNNER_OUTPUT,
        ],
    )
    def test_arrives_as_it_was(self, output: ModelRunnerOutput) -> None:
        assert carried(output) == output

    def test_keeps_its_place_in_the_pipeline(self) -> None:
        result = over_the_wire(encode_result(an_output(), STAMP, 42))
        assert (result.stamp, result.step) == (STAMP, 42)

    @pytest.mark.parametrize("offsets", [None, [0, 1, 2]])
    def test_keeps_logprobs_to_the_last_bit(self, offsets: list[int] | None) -> None:
        values = np.array([[-0.1, -np.inf], [-1e-30, -7.0]], dtype=np.float32)
        logprobs = LogprobsLists(
            np.array([[5, 6], [7, 8]], dtype=np.int32), values, np.array([1, 2], dtype=np.int64), offsets
        )
        found = carried(an_output(logprobs=logprobs)).logprobs
        assert found is not None and found.cu_num_generated_tokens == offsets
        for there, here in zip(found[:3], logprobs[:3], strict=True):
            assert there.dtype == here.dtype and (there == here).all()
        assert found.slice_request(1, 1).logprobs.tolist() == values[1:].tolist()

    @pytest.mark.filterwarnings("error")
    def test_keeps_prompt_logprobs_of_those_who_asked(self) -> None:
        tensors = LogprobsTensors(
            torch.tensor([[5, 6]], dtype=torch.int32),
            torch.tensor([[-0.5, -2.0]]),
            torch.tensor([3], dtype=torch.int32),
        )
        found = carried(an_output(prompt_logprobs_dict={"a": tensors, "b": None})).prompt_logprobs_dict
        assert list(found) == ["a"] and found["a"] is not None
        for there, here in zip(found["a"][:3], tensors[:3], strict=True):
            assert there.dtype == here.dtype and torch.equal(there, here)

    def test_of_an_unfinished_prompt_has_no_logprobs_but_a_shape(self) -> None:
        empty = LogprobsLists(np.zeros((0, 3), np.int32), np.zeros((0, 3), np.float32), np.zeros((0,), np.int32), None)
        found = carried(an_output(logprobs=empty)).logprobs
        assert found is not None and found.logprobs.shape == (0, 3)

    def test_tolerates_connectors_that_have_nothing_to_say(self) -> None:
        assert carried(an_output(pooler_output=[], kv_connector_output=KVConnectorOutput())) == an_output()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pooler_output", [torch.zeros(1)]),
        ("prompt_token_id_logprobs_dict", {"a": torch.zeros(1)}),
        ("kv_connector_output", KVConnectorOutput(invalid_block_ids={3})),
        ("aux_output_connector_output", {"a": object()}),
        ("sampling_masks", SamplingMaskLists(np.zeros(1))),
    ],
)
def test_what_the_wire_cannot_carry_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(Unsupported, match=name):
        encode_result(an_output(**{name: value}), STAMP, 1)


def test_boundaries_on_the_device_are_refused() -> None:
    tensors = LogprobsTensors(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), None, torch.zeros(1))
    with pytest.raises(Unsupported, match="adaptive"):
        encode_result(an_output(prompt_logprobs_dict={"a": tensors}), STAMP, 1)


class TestAMalformedResult:
    ROW = Array("float32", (1, 2), bytes(8))

    @pytest.mark.parametrize(
        "result",
        [
            StepResult(STAMP, 1, ["a", "a"], [], None, [], None),
            StepResult(STAMP, 1, ["a", "b"], [[1]], None, [], None),
            StepResult(STAMP, 1, ["a"], [[1]], Logprobs(ROW, ROW, ROW, None), [], None),
            StepResult(STAMP, 1, ["a"], [[1]], None, [("a", Logprobs(ROW, ROW, ROW, None))], None),
        ],
    )
    def test_is_told(self, result: StepResult) -> None:
        with pytest.raises(Malformed):
            decode_result(result)

    @pytest.mark.parametrize(
        "array",
        [
            Array("object", (1,), bytes(8)),
            Array("float32", (2,), bytes(4)),
            Array("float32", (-1, -1), bytes(4)),
            Array("float32", (), b""),
            Array("float32", (0, 2**63), b""),
            Array("float32", (0, *[2**40] * 3), b""),
        ],
    )
    def test_has_no_arrays_of_another_size_or_kind(self, array: Array) -> None:
        with pytest.raises(Malformed):
            decode_array(array)

    @given(
        dtype=st.sampled_from(["int32", "float32", "O", "", "<f4", "int7"]),
        shape=st.lists(st.integers(-3, 2**70), max_size=4).map(tuple),
        data=st.binary(max_size=16),
    )
    def test_never_raises_anything_else(self, dtype: str, shape: tuple[int, ...], data: bytes) -> None:
        with contextlib.suppress(Malformed):
            assert decode_array(Array(dtype, shape, data)).shape == shape


def test_arrays_of_python_objects_are_not_sent() -> None:
    with pytest.raises(Unsupported, match="found object"):
        encode_array(np.array([object()]))
