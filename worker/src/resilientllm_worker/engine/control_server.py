"""The engine's control server: ``PUT /v1/plan``, ``GET /v1/state``, ``GET /healthz``.

With ``?watch=true`` the state is a stream of JSON lines: at once when something changes that others act upon, and with
every heartbeat, so that silence means something.

Lives in the API server process, starts before vLLM is imported, and stays when EngineCore dies: it holds the plan and
the last state. EngineCore connects over a Unix socket that only this user can open.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Header, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from resilientllm_api.engine_state import STATE_HEARTBEAT_SECONDS, EnginePhase, EngineState
from resilientllm_api.plan import Plan
from resilientllm_api.ports import HEALTH_PATH, PLAN_PATH, STATE_PATH

from resilientllm_worker.seams.launch import BadConfiguration

logger = logging.getLogger(__name__)

MAX_PLAN_BYTES = 1 << 20
API_PROBE_SECONDS = 0.25


class PlanStore:
    """The plan at hand, in memory and on disk, and the engine's last word on its state. Thread-safe."""

    def __init__(self, instance: int, path: Path) -> None:
        self._instance = instance
        self._path = path
        self.changed = threading.Condition()
        self.plan = self._load()
        self.state = EngineState(instance=instance, phase=EnginePhase.STARTING, message="starts")
        """Of EngineCore. What is told outside is `public_state`."""
        self.heard_at = time.monotonic()
        """When EngineCore said anything last."""
        self.sick = ""
        """What `health` finds."""
        self.api_listens = False
        self.leaving = False
        """This process was told to end."""
        self.requests = 0
        """What the API has taken and not answered yet: EngineCore learns of a request only when it is tokenized."""
        self._watchers: set[Callable[[], object]] = set()

    def tell(self, **changes: Any) -> None:
        """Change what is told outside, and let those know who watch it."""
        for name, value in changes.items():
            setattr(self, name, value)
        for notify in tuple(self._watchers):
            notify()

    @contextlib.contextmanager
    def watched(self, notify: Callable[[], object]) -> Iterator[None]:
        """``notify`` is called, by any thread, whenever there may be news."""
        self._watchers.add(notify)
        try:
            yield
        finally:
            self._watchers.discard(notify)

    def public_state(self) -> EngineState:
        """EngineCore's state, as those outside meet it.

        An engine whose API nobody can reach yet does not serve, and one that was told to end takes nothing new.
        """
        state = self.state
        waiting = max(state.requests_waiting, self.requests - state.requests_running)
        if waiting != state.requests_waiting:
            state = state.model_copy(update={"requests_waiting": waiting})
        if self.leaving:
            message = f"ends when {self.requests} requests are done"
            return state.model_copy(update={"serving": False, "leaving": True, "message": message})
        if self.sick:
            return state.model_copy(update={"serving": False, "sick": self.sick, "message": self.sick})
        if self.api_listens or not state.serving:
            return state
        return state.model_copy(
            update={"phase": EnginePhase.ATTACHING, "serving": False, "message": "waits for its API server to listen"}
        )

    def put(self, plan: Plan) -> str | None:
        """Take a newer plan. Returns why not, if not."""
        if plan.instance != self._instance:
            return f"this is the engine of instance {self._instance}, the plan is for {plan.instance}"
        with self.changed:
            if self.plan is not None:
                if plan.version < self.plan.version:
                    return f"version {plan.version} is older than {self.plan.version}"
                if plan.version == self.plan.version:
                    return None if plan == self.plan else f"version {plan.version} is here with another content"
            self.plan = plan
            self.changed.notify_all()
            try:
                temporary = self._path.with_suffix(".new")
                temporary.write_text(plan.model_dump_json(by_alias=True))
                temporary.replace(self._path)
            except OSError as error:
                # The plan counts all the same: the file only spares an engine that restarts the wait for it.
                logger.error("plan %d could not be kept in %s: %s", plan.version, self._path, error)
        return None

    def _load(self) -> Plan | None:
        try:
            text = self._path.read_text()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BadConfiguration(f"plan file {self._path}: {error.strerror}") from error
        try:
            plan = Plan.model_validate_json(text)
        except ValidationError as error:
            raise BadConfiguration(f"plan file {self._path}: {error}") from error
        if plan.instance != self._instance:
            raise BadConfiguration(f"plan file {self._path} is for instance {plan.instance}, not {self._instance}")
        return plan


class ControlSocket:
    """The Unix socket to EngineCore. A new EngineCore connects anew and gets the plan at once."""

    def __init__(self, store: PlanStore) -> None:
        self._store = store
        self._folder = tempfile.TemporaryDirectory(prefix="resilientllm-")
        self.path = Path(self._folder.name) / "control"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(self.path))
        self.path.chmod(0o600)
        self._socket.listen(1)
        threading.Thread(target=self._accept, name="control-socket", daemon=True).start()

    def close(self) -> None:
        self._socket.close()
        self._folder.cleanup()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._send_plans, args=(peer,), name="plans-out", daemon=True).start()
            self._read_states(peer)

    def _send_plans(self, peer: socket.socket) -> None:
        sent: Plan | None = None
        while True:
            with self._store.changed:
                self._store.changed.wait_for(lambda sent=sent: self._store.plan != sent)  # type: ignore[misc]
                sent = self._store.plan
            assert sent is not None
            try:
                peer.sendall((sent.model_dump_json(by_alias=True) + "\n").encode())
            except OSError:
                return

    def _read_states(self, peer: socket.socket) -> None:
        try:
            with peer, peer.makefile("r", encoding="utf-8") as lines:
                for line in lines:
                    self._store.tell(state=EngineState.model_validate_json(line), heard_at=time.monotonic())
        except (OSError, ValidationError) as error:  # killed in the middle of a line, or with a plan unread
            logger.debug("EngineCore's control socket: %s", error)
        if self._store.state.phase is not EnginePhase.FAILED:
            gone = {"phase": EnginePhase.STARTING, "serving": False, "message": "EngineCore has gone"}
            self._store.tell(state=self._store.state.model_copy(update=gone))


def make_app(store: PlanStore, token: bytes) -> FastAPI:
    app = FastAPI(title="ResilientLLM engine control", docs_url=None, redoc_url=None, openapi_url=None)
    expected = b"Bearer " + token

    def authorise(authorization: str | None) -> None:
        if authorization is None or not hmac.compare_digest(authorization.encode(), expected):
            raise HTTPException(401, "expected the instance's token as a bearer token")

    # Not in threads: what waits in a pool of threads would hold up the end of the process.
    @app.get(HEALTH_PATH)
    async def health() -> dict[str, bool]:
        return {"alive": True}

    @app.get(STATE_PATH)
    async def state(watch: bool = False, authorization: Annotated[str | None, Header()] = None) -> Response:
        authorise(authorization)
        if watch:
            return StreamingResponse(_states(store), media_type="application/jsonl")
        return Response(store.public_state().model_dump_json(by_alias=True), media_type="application/json")

    @app.put(PLAN_PATH)
    async def plan(request: Request, authorization: Annotated[str | None, Header()] = None) -> Response:
        authorise(authorization)
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_PLAN_BYTES:
                raise HTTPException(413, f"expected a plan of at most {MAX_PLAN_BYTES} bytes")
        try:
            new = Plan.model_validate_json(bytes(body))
        except ValidationError as error:
            # Without the input, which JSON cannot always say again.
            return JSONResponse(
                {"error": error.errors(include_url=False, include_context=False, include_input=False)}, 422
            )
        if (refusal := store.put(new)) is not None:
            return JSONResponse({"error": refusal}, 409)
        return Response(status_code=204)

    return app


async def _states(store: PlanStore) -> AsyncIterator[str]:
    loop, news = asyncio.get_running_loop(), asyncio.Event()
    with store.watched(lambda: loop.call_soon_threadsafe(news.set)):
        while True:
            told = store.public_state()
            yield told.model_dump_json(by_alias=True) + "\n"
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STATE_HEARTBEAT_SECONDS):
                    while store.public_state().urgent == told.urgent:
                        news.clear()
                        await news.wait()


def serve(app: FastAPI, host: str, port: int) -> None:
    """Serve in a thread of this process, for as long as it lives."""
    listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    # vLLM's server, which starts later in this process, sets up access logging for both.
    logging.getLogger("uvicorn.access").addFilter(_is_news)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off"))
    # Signals belong to the main thread, where vLLM's own server handles them.
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="control", daemon=True).start()


def watch_api(store: PlanStore, host: str | None, port: int) -> None:
    """Note, in a thread of its own, when vLLM's API server in this process accepts connections."""
    target = "127.0.0.1" if host in (None, "", "0.0.0.0", "::") else host

    def watch() -> None:
        while not store.api_listens:
            try:
                socket.create_connection((target, port), API_PROBE_SECONDS).close()
                store.tell(api_listens=True)
            except OSError:
                time.sleep(API_PROBE_SECONDS)

    threading.Thread(target=watch, name="api-probe", daemon=True).start()


def _is_news(record: logging.LogRecord) -> bool:
    """The operator asks for the state twice a second."""
    return STATE_PATH not in record.getMessage() and HEALTH_PATH not in record.getMessage()
