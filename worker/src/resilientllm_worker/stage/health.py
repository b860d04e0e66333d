"""A stage's health for kubelet and people, and its metrics: plain HTTP, no secrets, nothing to change."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from resilientllm_api.ports import HEALTH_PATH, METRICS_PATH, READY_PATH

logger = logging.getLogger(__name__)

REQUEST_SECONDS = 5.0


@dataclass(frozen=True)
class NotReady:
    reason: str


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A probe that hung up is not worth a traceback."""
        logger.debug("health request of %s: %s", client_address, sys.exception())


class HealthServer:
    """``/healthz`` answers while the process lives; ``/readyz`` is 200 with the report of ``ready``, or 503;
    ``/metrics`` has what is registered at that moment."""

    def __init__(
        self, host: str, port: int, ready: Callable[[], dict[str, object] | NotReady], registry: CollectorRegistry
    ) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = REQUEST_SECONDS

            def do_GET(self) -> None:
                if self.path == HEALTH_PATH:
                    self._answer(200, {"alive": True})
                elif self.path == READY_PATH:
                    report = ready()
                    if isinstance(report, NotReady):
                        self._answer(503, {"ready": False, "reason": report.reason})
                    else:
                        self._answer(200, report)
                elif self.path == METRICS_PATH:
                    self._send(200, CONTENT_TYPE_LATEST, generate_latest(registry))
                else:
                    self._answer(404, {"error": f"expected {HEALTH_PATH}, {READY_PATH} or {METRICS_PATH}"})

            def _answer(self, status: int, body: dict[str, object]) -> None:
                self._send(status, "application/json", json.dumps(body).encode())

            def _send(self, status: int, content_type: str, payload: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, format: str, *args: object) -> None:
                """Probes come every second; they are not news."""

        self._server = _Server((host, port), Handler)
        threading.Thread(target=self._server.serve_forever, name="health", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
