"""What the operator knows of engines, first hand: asks for their state, tells them plans, wants a token as proof."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import aiohttp
from pydantic import ValidationError
from resilientllm_api.engine_state import EngineState
from resilientllm_api.plan import Plan
from resilientllm_api.ports import ENGINE_API_PORT, ENGINE_CONTROL_PORT, PLAN_PATH, STATE_PATH

from resilientllm_operator.instances import KEEPS_VERIFICATION
from resilientllm_operator.world import Contact, EngineView

logger = logging.getLogger(__name__)

_ASK_TIMEOUT = aiohttp.ClientTimeout(total=1.5)
_VERIFY_TIMEOUT = aiohttp.ClientTimeout(total=60.0)
"""The first token may have to wait for kernels to be compiled."""
_SILENCE = 4
"""So many unanswered questions in a row: a busy machine may miss one, and that is no reason to stop serving."""
_PATIENCE = 5
"""So many failed verifications in a row are trouble: an engine may say that it serves before its API listens."""


class EngineError(Exception):
    """An engine did not do what it was asked to; for the log and the condition."""


@dataclass(frozen=True)
class EngineAddress:
    """An engine's pod, and where its two servers listen."""

    uid: str
    ip: str
    api_port: int = ENGINE_API_PORT
    control_port: int = ENGINE_CONTROL_PORT

    @property
    def control(self) -> str:
        return f"http://{self.ip}:{self.control_port}"

    @property
    def api(self) -> str:
        return f"http://{self.ip}:{self.api_port}"


class Engines:
    """The engines of one object. ``token`` is the bearer token that they were given."""

    def __init__(self, token: str) -> None:
        self._session = aiohttp.ClientSession()
        self._authorization = {"Authorization": f"Bearer {token}"}
        self._views: dict[str, EngineView] = {}
        self._unanswered: dict[str, int] = {}
        self._unproven: dict[str, int] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._session.close()

    @property
    def views(self) -> Mapping[str, EngineView]:
        return dict(self._views)

    def keep(self, uids: Iterable[str], verified: Mapping[str, str]) -> None:
        """Forgets all other engines. ``verified`` is what the status remembers of those not met yet."""
        wanted = set(uids)
        self._views = {uid: self._views.get(uid, EngineView(verified=verified.get(uid))) for uid in wanted}
        self._unanswered = {uid: count for uid, count in self._unanswered.items() if uid in wanted}
        self._unproven = {uid: count for uid, count in self._unproven.items() if uid in wanted}

    async def ask(self, engine: EngineAddress) -> None:
        """Asks one engine for its state and remembers the answer, or that there was none."""
        try:
            async with self._session.get(
                engine.control + STATE_PATH, headers=self._authorization, timeout=_ASK_TIMEOUT
            ) as response:
                if response.status != 200:
                    raise EngineError(f"GET {STATE_PATH} was answered with {response.status}")
                state = EngineState.model_validate_json(await response.read())
        except aiohttp.ClientConnectorError as error:
            # Nobody listens: unlike silence, that is certain.
            self._missed(engine, error, certain=True)
        except (aiohttp.ClientError, TimeoutError, ValidationError, EngineError) as error:
            self._missed(engine, error, certain=False)
        else:
            self._unanswered.pop(engine.uid, None)
            self._update(engine.uid, contact=Contact.ANSWERS, state=state)
            if state.phase not in KEEPS_VERIFICATION:
                self._update(engine.uid, verified=None)

    async def publish(self, engine: EngineAddress, plan: Plan) -> None:
        """Tells an engine its plan. Raises EngineError if it does not take it."""
        body = plan.model_dump_json(by_alias=True)
        try:
            async with self._session.put(
                engine.control + PLAN_PATH,
                data=body,
                headers={**self._authorization, "Content-Type": "application/json"},
                timeout=_ASK_TIMEOUT,
            ) as response:
                if response.status >= 300:
                    raise EngineError(f"engine {engine.ip} refused plan {plan.version}: {await _reason(response)}")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EngineError(f"engine {engine.ip} did not take plan {plan.version}: {_words(error)}") from error

    async def verify(self, engine: EngineAddress, incarnation: str, model: str) -> bool:
        """Asks for one real token, and remembers whether it came."""
        try:
            await self._one_token(engine, model)
        except (aiohttp.ClientError, TimeoutError, ValueError, EngineError) as error:
            self._unproven[engine.uid] = self._unproven.get(engine.uid, 0) + 1
            trouble = _words(error) if self._unproven[engine.uid] >= _PATIENCE else None
            self._update(engine.uid, verified=None, verify_error=trouble)
            return False
        self._unproven.pop(engine.uid, None)
        self._update(engine.uid, verified=incarnation, verify_error=None)
        return True

    async def _one_token(self, engine: EngineAddress, model: str) -> None:
        body = {"model": model, "prompt": "1", "max_tokens": 1, "temperature": 0}
        async with self._session.post(f"{engine.api}/v1/completions", json=body, timeout=_VERIFY_TIMEOUT) as response:
            if response.status != 200:
                raise EngineError(f"POST /v1/completions was answered with {await _reason(response)}")
            answer = await response.json()
        tokens = (answer.get("usage") or {}).get("completion_tokens", 0)
        if tokens < 1:
            raise EngineError(f"POST /v1/completions gave {tokens} tokens, where one was asked for")

    def _missed(self, engine: EngineAddress, error: Exception, *, certain: bool) -> None:
        self._unanswered[engine.uid] = self._unanswered.get(engine.uid, 0) + 1
        logger.debug("engine %s did not tell its state: %s", engine.ip, _words(error))
        if certain or self._unanswered[engine.uid] >= _SILENCE:
            self._update(engine.uid, contact=Contact.SILENT, state=None, verified=None)

    def _update(self, uid: str, **changes: object) -> None:
        if uid in self._views:
            self._views[uid] = replace(self._views[uid], **changes)  # type: ignore[arg-type]


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


async def _reason(response: aiohttp.ClientResponse) -> str:
    return f"{response.status} {(await response.text())[:300]}".strip()
