"""Where this rank's weights come from: a twin if one gives them, else storage. And whom they are given to."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from resilientllm_worker.protocol.messages import PROTOCOL_VERSION, WeightsHello
from resilientllm_worker.seams.weights import Loading, ModelWeights, install, weights_digest
from resilientllm_worker.weights.giver import give
from resilientllm_worker.weights.taker import NotTaken, Taken, take

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from resilientllm_worker.transport.connection import Connection

logger = logging.getLogger(__name__)


class StageWeights:
    """Of one rank. Make it before the model, which it has an influence on."""

    def __init__(
        self, config: VllmConfig, stage: int, rank: int, twins: Sequence[str], token: bytes, lend: bool
    ) -> None:
        """``twins`` are asked in order. ``lend``: keep what can be given to others."""
        self._digest = weights_digest(config, stage, rank)
        self._hello = WeightsHello(PROTOCOL_VERSION, stage, rank, self._digest)
        self._twins = twins
        self._token = token
        self._taken: Taken | None = None
        self._reason = ""
        self._loading: Loading = install(config, self._fill if twins else None, lend)

    def _fill(self, memory: ModelWeights) -> bool:
        try:
            self._taken = take(self._twins, self._token, self._hello, memory)
        except NotTaken as error:
            self._reason = str(error)
            return False
        return True

    @property
    def figures(self) -> tuple[str, float, int]:
        """Once they are loaded: from a ``twin`` or from ``storage``, in how many seconds, how many bytes."""
        return "twin" if self._taken else "storage", self._loading.seconds, self._loading.nbytes

    def report(self) -> dict[str, object]:
        """For people, once they are loaded."""
        loading = self._loading
        reason = "" if self._taken else self._reason or loading.refusal
        return {
            "source": f"twin {self._taken.source}" if self._taken else "storage",
            "seconds": round(loading.seconds, 3),
            "bytes": loading.nbytes,
            **({"reason": reason} if reason else {}),
            "lent": loading.lent is not None,
        }

    def tell(self) -> None:
        """One line in the log of where they came from."""
        report = self.report()
        because = f", because: {report['reason']}" if "reason" in report else ""
        logger.info(
            "weights came from %s: %s bytes in %s s%s", report["source"], report["bytes"], report["seconds"], because
        )

    def give(self, connection: Connection, hello: WeightsHello) -> None:
        """Answers a twin that starts; runs in that connection's thread."""
        give(connection, hello, self._digest, self._loading.lent)
