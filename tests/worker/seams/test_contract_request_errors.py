"""A request that the scheduler failed is told to its client as one that can be sent again."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest
from resilientllm_worker.seams.request_errors import MESSAGE, tell_that_retrying_helps
from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.exceptions import RetryableRequestError

from tests.worker.seams.vllm_source import attributes_of


@pytest.fixture
def replaced() -> Iterator[Any]:
    stock = GenerateBaseServing._raise_if_error
    tell_that_retrying_helps()
    yield stock
    GenerateBaseServing._raise_if_error = stock


def test_the_method_that_is_replaced_is_there_and_takes_the_same(replaced: Any) -> None:
    assert list(inspect.signature(replaced).parameters) == ["self", "finish_reason", "request_id"]
    assert list(inspect.signature(GenerateBaseServing._raise_if_error).parameters) == list(
        inspect.signature(replaced).parameters
    )


def test_a_failed_request_may_be_sent_again(replaced: Any) -> None:
    with pytest.raises(RetryableRequestError, match="again") as error:
        GenerateBaseServing._raise_if_error(SimpleNamespace(), "error", "r")
    assert str(error.value) == MESSAGE
    assert error.value.status_code == HTTPStatus.SERVICE_UNAVAILABLE


@pytest.mark.parametrize("reason", [None, "stop", "length", "abort"])
def test_any_other_end_is_no_error(replaced: Any, reason: str | None) -> None:
    GenerateBaseServing._raise_if_error(SimpleNamespace(), reason, "r")


@pytest.mark.parametrize("path", ["completion", "chat_completion"])
def test_completions_and_chats_still_ask_it(path: str) -> None:
    assert "_raise_if_error" in attributes_of(f"entrypoints/openai/{path}/serving.py", "self")
