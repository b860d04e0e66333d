"""Seam: how a request that the scheduler failed shows to its client.

Stock vLLM says "Internal server error" with status 500 (vllm/entrypoints/generate/base/serving.py,
``_raise_if_error``). A request that waited in vain for a stage can be sent again, to another instance or later, and
clients should be told so: status 503 and a message that says it.
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)

MESSAGE = (
    "The instance lost a stage and no other could stand in in time, or the request asks for a feature that it does "
    "not support. Send the request again."
)


def tell_that_retrying_helps() -> None:
    """Replace the stock error of failed requests, in this API server process."""
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    from vllm.exceptions import RetryableRequestError

    def raise_if_error(self: Any, finish_reason: str | None, request_id: str) -> None:
        if finish_reason == "error":
            logger.error("request %s failed: %s", request_id, MESSAGE)
            raise RetryableRequestError(MESSAGE)

    GenerateBaseServing._raise_if_error = raise_if_error
