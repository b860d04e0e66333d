"""Asks stages and engines how they are. No answer is an answer: None."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from resilientllm_api.engine_state import EngineState
from resilientllm_api.ports import READY_PATH, STATE_PATH

TIMEOUT_SECONDS = 2.0


def stage_rank_pids(health: str) -> tuple[int, ...] | None:
    """Process ids of a ready stage's ranks, in order of rank; None while it is not ready."""
    answer = _get(f"http://{health}{READY_PATH}", {})
    if answer is None:
        return None
    return tuple(rank["pid"] for rank in sorted(answer["ranks"], key=lambda rank: int(rank["rank"])))


def stage_counts(health: str) -> dict[str, int] | None:
    """What a stage has done since its process started: ``steps`` of its runner, and ``merged`` ones among them."""
    answer = _get(f"http://{health}{READY_PATH}", {})
    return None if answer is None else dict(answer["counts"])


@dataclass(frozen=True)
class StageWeights:
    """How rank 0 of a stage came to its weights."""

    source: str
    """``storage``, or ``twin`` with an address."""
    seconds: float
    """Of reading or receiving them, and no more."""
    nbytes: int
    reason: str
    """Why no twin gave them, if one was to."""


def stage_weights(health: str) -> StageWeights | None:
    answer = _get(f"http://{health}{READY_PATH}", {})
    if answer is None:
        return None
    found = answer["weights"]
    return StageWeights(found["source"], found["seconds"], found["bytes"], found.get("reason", ""))


def engine_state(control_url: str, token: str) -> EngineState | None:
    answer = _get(f"{control_url}{STATE_PATH}", {"Authorization": f"Bearer {token}"})
    if answer is None:
        return None
    try:
        return EngineState.model_validate(answer)
    except ValidationError as error:
        raise RuntimeError(f"{control_url}{STATE_PATH} answered no EngineState: {error}") from error


def api_answers(url: str) -> bool:
    """vLLM's API server listens after its engine serves."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=TIMEOUT_SECONDS):
            return True
    except (OSError, http.client.HTTPException):
        return False


def metric(url: str, name: str) -> float:
    """The sum of a metric of an engine or a stage over its labels; ValueError if there is none of that name."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=TIMEOUT_SECONDS) as response:
        lines = response.read().decode().splitlines()
    values = [float(line.split()[-1]) for line in lines if line.startswith((f"{name}{{", f"{name} "))]
    if not values:
        raise ValueError(f"expected the metric {name} at {url}, found none")
    return sum(values)


def _get(url: str, headers: dict[str, str]) -> Any:
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            return json.load(response)
    except urllib.error.HTTPError as refused:
        if refused.code in (401, 403):
            raise RuntimeError(f"{url} refused our token: is another run on this port?") from refused
        return None
    except (OSError, http.client.HTTPException, ValueError):
        return None  # Not listening yet, or it died while it answered: both are "not now".
