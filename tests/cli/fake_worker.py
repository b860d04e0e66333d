"""Stands in for a stage or an engine where only local mode itself is tested: the same flags and answers, no model.

FAKE_EXIT: exit code to leave with at once, after saying why.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    for flag in ("--instance", "--stage", "--listen", "--health", "--token-file", "--plan-file", "--control", "--port"):
        parser.add_argument(flag)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    return parser.parse_known_args()[0]


def answer(
    arguments: argparse.Namespace, other_ranks: list[int], authorization: str | None
) -> dict[str, object] | None:
    if arguments.control is None:
        ranks = [{"rank": rank, "pid": pid} for rank, pid in enumerate([os.getpid(), *other_ranks])]
        return {"ready": True, "ranks": ranks}
    if authorization != f"Bearer {Path(arguments.token_file).read_text()}":
        return None
    plan = json.loads(Path(arguments.plan_file).read_text())
    whole = all(listens(stage["address"]) for stage in plan["stages"])
    return {
        "instance": int(arguments.instance),
        "phase": "Serving" if whole else "Degraded",
        "serving": True,
        "onOwnStages": whole,
        "replication": [] if plan["replication"] == "None" else [keeping(plan, place) for place in plan["stages"]],
    }


def keeping(plan: dict[str, Any], place: dict[str, Any]) -> dict[str, object]:
    stage = place["id"]["stage"]
    return {"stage": stage, "keptBy": plan["donors"][stage][0]["id"], "healthy": True, "lagSeconds": 0.25 * stage}


def listens(address: str) -> bool:
    try:
        urllib.request.urlopen(f"http://{address}/readyz", timeout=1).close()
    except OSError:
        return False
    return True


def main() -> None:
    arguments = parse()
    if "FAKE_EXIT" in os.environ:
        print("some log\nexpected a better configuration")
        sys.exit(int(os.environ["FAKE_EXIT"]))
    own = subprocess.Popen(["sleep", "600"])  # A worker process, as vLLM's EngineCore is, or another rank of a stage.
    other_ranks = [own.pid] if arguments.control is None and arguments.tensor_parallel_size == 2 else []
    if other_ranks:
        threading.Thread(target=lambda: os._exit(own.wait() and 1), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            healthy = self.path == "/health"
            said = {} if healthy else answer(arguments, other_ranks, self.headers.get("Authorization"))
            self.send_response(401 if said is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, *_: object) -> None:
            pass

    stage = [arguments.listen, arguments.health]
    servers = stage if arguments.control is None else [arguments.control, f"127.0.0.1:{arguments.port}"]
    listening = [
        ThreadingHTTPServer((host, int(port)), Handler) for host, port in (server.split(":") for server in servers)
    ]
    for server in listening[1:]:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    listening[0].serve_forever()


if __name__ == "__main__":
    main()
