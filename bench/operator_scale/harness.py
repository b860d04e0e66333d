"""The processes that take part: the operator as it is shipped, all engines in one, and what the operator uses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from e2e.cluster.launch import REPOSITORY
from e2e.cluster.lone import DIES_WITH_US, LoneControlPlane

METRICS_PORT = 18080
SYSTEM = "resilientllm-system"


@dataclass(frozen=True)
class Usage:
    at: float
    cpu_seconds: float
    rss_mb: float
    peak_mb: float


def usage(pid: int) -> Usage:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    memory = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return Usage(
        at=time.monotonic(),
        cpu_seconds=(int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
        rss_mb=int(memory["VmRSS"].split()[0]) / 1024,
        peak_mb=int(memory["VmHWM"].split()[0]) / 1024,
    )


def between(before: Usage, after: Usage) -> dict[str, Any]:
    seconds = after.at - before.at
    return {
        "seconds": seconds,
        "cpu_seconds": after.cpu_seconds - before.cpu_seconds,
        "cpu_share_of_a_core": (after.cpu_seconds - before.cpu_seconds) / seconds,
        "rss_mb": after.rss_mb,
        "peak_rss_mb": after.peak_mb,
    }


@asynccontextmanager
async def processes(control_plane: LoneControlPlane, token: str, folder: Path) -> AsyncIterator[dict[str, Any]]:
    """Engines and the operator; both are gone afterwards."""
    kubeconfig = folder / "operator.kubeconfig"
    config = json.loads(control_plane.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": token}
    kubeconfig.write_text(yaml.safe_dump(config))
    commands: dict[str, list[str | Path]] = {
        "engines": [sys.executable, "-m", "e2e.simulation.engines"],
        "operator": [
            *(sys.executable, "-m", "resilientllm_operator.main", "--kubeconfig", kubeconfig),
            *("--port", str(METRICS_PORT), "--log-level", "WARNING"),
        ],
    }
    running: dict[str, Any] = {}
    try:
        for name, command in commands.items():
            with (folder / f"{name}.log").open("ab") as log:
                running[name] = subprocess.Popen(
                    [*DIES_WITH_US, *(str(part) for part in command)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE if name == "engines" else log,
                    stderr=log,
                    cwd=REPOSITORY,
                )
            if name == "engines":
                assert running[name].stdout.readline() == b"ready\n"
        yield running
    finally:
        for process in reversed(running.values()):
            process.terminate()
        for process in running.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            process.wait()


async def rounds() -> dict[str, float]:
    """The operator's own count: by result, and how many took no longer than ``le`` seconds."""
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{METRICS_PORT}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    found = {}
    for line in lines:
        if line.startswith(("resilientllm_operator_rounds_total", "resilientllm_operator_round_seconds_")):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    return found


def install(control_plane: LoneControlPlane) -> str:
    """CRD and RBAC as shipped; a token of the operator's account."""
    control_plane.kubectl("apply", "--kustomize", str(REPOSITORY / "manifests" / "base"))
    control_plane.kubectl("wait", "--for=condition=Established", "crd/resilientllms.resilientllm.dev", "--timeout=60s")
    account = ("create", "token", "resilientllm-operator", "--duration=6h")
    return control_plane.kubectl(f"--namespace={SYSTEM}", *account).strip()
