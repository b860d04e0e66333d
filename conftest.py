"""For all tests of the repository: their order, and that none of them leaves a process behind."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A run says the same of the same code, on a slow machine too; `--hypothesis-profile=random` looks further.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("random", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("same")

RUN_VARIABLE = "RESILIENTLLM_TEST_RUN"
"""Marks everything that a run starts: environments are inherited, also by processes that left their parent."""
GRACE_SECONDS = 10.0
_OF_PYTHON = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
"""Helpers of this very process, which end with it."""

_CHECKS = Path(__file__).parent / "tests" / "repo"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What fails soonest runs first: checks, tests of a moment, those that start vLLM, those that start a cluster."""
    items.sort(key=_tier)


def _tier(item: pytest.Item) -> int:
    if item.get_closest_marker("cluster"):
        return 3
    if item.get_closest_marker("engine"):
        return 2
    return 0 if item.path.is_relative_to(_CHECKS) else 1


@pytest.fixture(scope="session", autouse=True)
def nothing_left_running() -> Iterator[None]:
    """Fails the run at its end if a process of it is still alive, and ends that process."""
    mark = uuid.uuid4().hex
    os.environ[RUN_VARIABLE] = mark
    yield
    deadline = time.monotonic() + GRACE_SECONDS
    while (left := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left, f"tests left {len(left)} processes behind, which were now killed: {'; '.join(left.values())}"


def _marked(mark: str) -> dict[int, str]:
    """Living processes of this run but ourselves, with their command lines."""
    wanted = f"{RUN_VARIABLE}={mark}".encode()
    found: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        # A process that is just ending, or belongs to somebody else, cannot be read; a zombie has nothing to read.
        with suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if not any(helper in command for helper in _OF_PYTHON):
                    found[int(folder.name)] = command
    return found
