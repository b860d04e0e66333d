"""What the operator knows of engines, first hand: hears their state, tells them plans, wants a token as proof.

Each engine is listened to by a task of its own, so that one which hangs holds up nothing that is known of the others.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Self

import aiohttp
from resilientllm_api.engine_state import STATE_HEARTBEAT_SECONDS, EngineState
from resilientllm_api.plan import Plan
from resilientllm_api.ports import ENGINE_API_PORT, ENGINE_CONTROL_PORT, PLAN_PATH, STATE_PATH

from resilientllm_operator.instances import KEEPS_VERIFICATION
from resilientllm_operator.world import Contact, EngineView

logger = logging.getLogger(__name__)

SILENCE_SECONDS = 4 * STATE_HEARTBEAT_SECONDS
"""An engine that has said nothing for so long does not serve. A busy machine may miss a heartbeat or two."""
_AGAIN_SECONDS = 0.25
_PROBES = ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 3))
"""The kernel asks every second whether the other end is still there: a node that is gone says nothing."""
_WATCH_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=1.5, sock_read=SILENCE_SECONDS)
_PUBLISH_TIMEOUT = aiohttp.ClientTimeout(total=1.5)
_VERIFY_TIMEOUT = aiohttp.ClientTimeout(total=60.0)
"""The first token may have to wait for kernels to be compiled."""
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


class EngineHttp:
    """One HTTP session with the engines of all objects."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, socket_factory=_probed_socket)
            self._session = aiohttp.ClientSession(connector=connector)
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


class Engines:
    """The engines of one object."""

    def __init__(
        self, token: str, on_change: Callable[[], None] = lambda: None, http: EngineHttp | None = None
    ) -> None:
        """``token`` is the bearer token that they were given. ``on_change``: something that asks for a decision."""
        self._on_change = on_change
        self._http = http or EngineHttp()
        self._owns_http = http is None
        self._authorization = {"Authorization": f"Bearer {token}"}
        self._views: dict[str, EngineView] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._heard: dict[str, float] = {}
        """When each said something last; monotonic clock."""
        self._unproven: dict[str, int] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        self.keep((), {})
        if self._owns_http:
            await self._http.close()

    @property
    def views(self) -> Mapping[str, EngineView]:
        return dict(self._views)

    def keep(self, engines: Iterable[EngineAddress], verified: Mapping[str, str]) -> None:
        """Listens to these and forgets all others. ``verified``: what the status remembers of those not met yet."""
        wanted = {engine.uid: engine for engine in engines}
        self._views = {uid: self._views.get(uid, EngineView(verified=verified.get(uid))) for uid in wanted}
        self._heard = {uid: at for uid, at in self._heard.items() if uid in wanted}
        self._unproven = {uid: count for uid, count in self._unproven.items() if uid in wanted}
        for uid in self._watches.keys() - wanted.keys():
            self._watches.pop(uid).cancel()
        for uid in wanted.keys() - self._watches.keys():
            self._watches[uid] = asyncio.create_task(self._watch(wanted[uid]), name=f"engine {wanted[uid].ip}")

    async def _watch(self, engine: EngineAddress) -> None:
        """Listens to one engine for as long as it is to be known."""
        self._heard[engine.uid] = time.monotonic()
        while True:
            try:
                await self._listen(engine)
            except aiohttp.ClientConnectorError as error:
                # Nobody listens: unlike silence, that is certain.
                self._missed(engine, error, certain=True)
            except (aiohttp.ClientError, TimeoutError, ValueError, EngineError) as error:
                self._missed(engine, error, certain=False)
            await asyncio.sleep(_AGAIN_SECONDS)

    async def _listen(self, engine: EngineAddress) -> None:
        """Until the engine says no more. One that tells its state only once, because it is older, is asked again."""
        told = b""
        async with self._http.session.get(
            engine.control + STATE_PATH, params={"watch": "true"}, headers=self._authorization, timeout=_WATCH_TIMEOUT
        ) as response:
            if response.status != 200:
                raise EngineError(f"GET {STATE_PATH} was answered with {response.status}")
            async for line in response.content:
                self._heard[engine.uid] = time.monotonic()
                # Most are heartbeats of an engine of which nothing has changed. A line is longer than all that it says.
                if (digest := blake2b(line, digest_size=16).digest()) != told:
                    self._take(engine.uid, EngineState.model_validate_json(line))
                    told = digest

    def _take(self, uid: str, state: EngineState) -> None:
        verified = self._views[uid].verified if state.phase in KEEPS_VERIFICATION else None
        self._update(uid, contact=Contact.ANSWERS, state=state, verified=verified)

    async def publish(self, engine: EngineAddress, plan: Plan) -> None:
        """Tells an engine its plan. Raises EngineError if it does not take it."""
        body = plan.model_dump_json(by_alias=True)
        try:
            async with self._http.session.put(
                engine.control + PLAN_PATH,
                data=body,
                headers={**self._authorization, "Content-Type": "application/json"},
                timeout=_PUBLISH_TIMEOUT,
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
        post = self._http.session.post(f"{engine.api}/v1/completions", json=body, timeout=_VERIFY_TIMEOUT)
        async with post as response:
            if response.status != 200:
                raise EngineError(f"POST /v1/completions was answered with {await _reason(response)}")
            answer = await response.json()
        tokens = (answer.get("usage") or {}).get("completion_tokens", 0)
        if tokens < 1:
            raise EngineError(f"POST /v1/completions gave {tokens} tokens, where one was asked for")

    def _missed(self, engine: EngineAddress, error: Exception, *, certain: bool) -> None:
        logger.debug("engine %s did not tell its state: %s", engine.ip, _words(error))
        if certain or time.monotonic() - self._heard[engine.uid] >= SILENCE_SECONDS:
            self._update(engine.uid, contact=Contact.SILENT, state=None, verified=None)

    def _update(self, uid: str, **changes: object) -> None:
        before = self._views.get(uid)
        if before is None:
            return
        after = self._views[uid] = replace(before, **changes)  # type: ignore[arg-type]
        if _news(after) != _news(before):
            self._on_change()


def _news(view: EngineView) -> tuple[object, ...]:
    """What a decision may follow from, at once or as a matter of time: all but the figures that change all the time."""
    return view.contact, view.verified, view.verify_error, view.state and _news_of_state(view.state)


def _news_of_state(state: EngineState) -> tuple[object, ...]:
    idle = not state.requests_running and not state.requests_waiting
    copies = [
        (place.kept_by, place.supported, place.healthy, place.message, int(place.lag_seconds))
        for place in state.replication
    ]
    return state.urgent, idle, state.message, state.recoveries, copies


def _probed_socket(address: tuple[Any, ...]) -> socket.socket:
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _PROBES:
        made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


async def _reason(response: aiohttp.ClientResponse) -> str:
    return f"{response.status} {(await response.text())[:300]}".strip()
