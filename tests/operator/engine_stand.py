"""What stands for an engine on a real cluster: its own control server, and an API that gives one token.

Only vLLM and the stages are missing: the test says what EngineCore would say.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from pathlib import Path
from typing import Any, Self

import uvicorn
from fastapi import FastAPI
from resilientllm_api.engine_state import EngineState
from resilientllm_api.ports import ENGINE_API_PORT, ENGINE_CONTROL_PORT
from resilientllm_worker.engine.control_server import PlanStore, make_app


class EngineStand:
    """Runs in a thread of its own, for as long as the block lasts."""

    def __init__(self, host: str, token: bytes, folder: Path, state: EngineState) -> None:
        self.host = host
        self.store = PlanStore(state.instance, folder / "plan.json")
        self.store.tell(state=state, api_listens=True)
        api = FastAPI()

        @api.post("/v1/completions")
        async def complete() -> dict[str, Any]:
            return {"usage": {"completion_tokens": 1}}

        self._servers = [
            (uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off")), (host, port))
            for app, port in ((make_app(self.store, token), ENGINE_CONTROL_PORT), (api, ENGINE_API_PORT))
        ]
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="engine stand")

    async def _serve(self) -> None:
        listening = [socket.create_server(address) for _, address in self._servers]
        await asyncio.gather(
            *(server._serve(sockets=[each]) for (server, _), each in zip(self._servers, listening, strict=True))
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for server, _ in self._servers:
            server.force_exit = server.should_exit = True  # the operator listens for ever
        self._thread.join()

    def says(self, **changes: Any) -> None:
        """EngineCore says something else from now on."""
        self.store.tell(state=self.store.state.model_copy(update=changes))
