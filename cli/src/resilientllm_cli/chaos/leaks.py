"""What a world holds while it is idle, before a run and after it: what has grown, leaks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from resilientllm_cli.chaos.world import World
from resilientllm_cli.supervise.warden import members

SETTLE_SECONDS = 6.0
"""For what a run has left to close."""
POLL_SECONDS = 0.25
MORE_DESCRIPTORS = 4
"""Of one process: a connection may be just being dialled anew."""
MORE_CONNECTIONS = 8
MORE_BYTES = 64 << 20
"""Of the memory of one process, in one run; what grows by less in each of many shows in the lines."""


@dataclass(frozen=True)
class Size:
    """Of a process."""

    descriptors: int
    resident_bytes: int


@dataclass(frozen=True)
class Holding:
    processes: int
    descriptors: Mapping[int, int]
    """By pid."""
    resident_bytes: Mapping[int, int]
    connections: int
    """Ends of established TCP connections."""
    shared_memory: int
    """Files."""
    kv_in_use: float
    """The share of KV blocks held by requests, of the instance that is worst; 0 when idle."""


@dataclass(frozen=True)
class Leaks:
    """What is more than before. Of descriptors and memory: in the process that gained most, of those that lived on."""

    processes: int
    descriptors: int
    resident_bytes: int
    connections: int
    shared_memory: int
    kv_in_use: float

    def problems(self) -> list[str]:
        bounds = {
            "processes": 0,
            "descriptors": MORE_DESCRIPTORS,
            "resident_bytes": MORE_BYTES,
            "connections": MORE_CONNECTIONS,
            "shared_memory": 0,
            "kv_in_use": 0.0,
        }
        return [f"leaks {name}: {getattr(self, name)}" for name, bound in bounds.items() if getattr(self, name) > bound]


def look(world: World) -> Holding:
    pids = members(set(world.processes.pids().values()))
    sizes = sizes_of(pids)
    return Holding(
        processes=len(pids),
        descriptors={pid: size.descriptors for pid, size in sizes.items()},
        resident_bytes={pid: size.resident_bytes for pid, size in sizes.items()},
        connections=world.network.connections(),
        shared_memory=sum(1 for _ in Path("/dev/shm").iterdir()),
        kv_in_use=max(world.kv_in_use(instance) for instance in range(world.shape.instances)),
    )


def held(world: World) -> dict[str, dict[str, int]]:
    """By each program; ``life`` counts its starts: what is of one life can grow."""
    processes = world.processes
    return {
        name: together(processes.starts(name), sizes_of(pids).values())
        for name in world.names()
        if (pids := processes.family(name))
    }


def together(life: int, sizes: Iterable[Size]) -> dict[str, int]:
    """What the processes of one program hold. ``life``: which of its starts it is."""
    sizes = list(sizes)
    return {
        "life": life,
        "descriptors": sum(size.descriptors for size in sizes),
        "resident_bytes": sum(size.resident_bytes for size in sizes),
    }


def sizes_of(pids: Iterable[int]) -> dict[int, Size]:
    """Of those that still run."""
    found = {}
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            found[pid] = Size(
                descriptors=sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()),
                resident_bytes=int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
            )
    return found


def compare(before: Holding, after: Holding) -> Leaks:
    def most(one: Mapping[int, int], other: Mapping[int, int]) -> int:
        return max((other[pid] - one[pid] for pid in one.keys() & other.keys()), default=0)

    return Leaks(
        processes=after.processes - before.processes,
        descriptors=most(before.descriptors, after.descriptors),
        resident_bytes=most(before.resident_bytes, after.resident_bytes),
        connections=after.connections - before.connections,
        shared_memory=after.shared_memory - before.shared_memory,
        kv_in_use=after.kv_in_use,
    )


def settled(before: Holding, look: Callable[[], Holding]) -> Leaks:
    """As soon as there is none, or what there is after a while."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while (leaks := compare(before, look())).problems() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return leaks
