"""CPU time of the processes of a cluster, thread by thread, as Linux counts it.

Threads that replicate are told from others by their niceness: Python gives its threads' names to the system from 3.14
on only. A thread that ended between two looks is not counted, so look while nothing starts or ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from resilientllm_cli.local.cluster import LocalCluster
from resilientllm_cli.supervise import warden

REPLICATION_NICENESS = 10
"""``replication/priority.py`` of the worker."""
PROC = Path("/proc")


@dataclass(frozen=True)
class ThreadTime:
    process: str
    """What it is: ``stage 0.1``, ``API server 0``, ``engine core 0``."""
    pid: int
    thread: int
    """Rises with the age of a process, so that of two threads the elder has the lower one."""
    niceness: int
    seconds: float

    @property
    def replicates(self) -> bool:
        return self.niceness == REPLICATION_NICENESS


def parse(process: str, pid: int, stat: str, schedstat: str) -> ThreadTime:
    """``stat``: thread (name) state …, niceness as the 19th field; ``schedstat``: nanoseconds on a CPU come first."""
    thread = int(stat.split(" ", 1)[0])
    niceness = int(stat.rpartition(")")[2].split()[16])
    return ThreadTime(process, pid, thread, niceness, int(schedstat.split()[0]) / 1e9)


def threads(process: str, pid: int, proc: Path = PROC) -> list[ThreadTime]:
    found = []
    for entry in (proc / str(pid) / "task").iterdir():
        with contextlib.suppress(OSError):  # it ended while we looked
            found.append(
                parse(process, pid, (entry / "stat").read_text(), (entry / "schedstat").read_text()),
            )
    return found


def of_cluster(cluster: LocalCluster) -> list[ThreadTime]:
    state = cluster.state()
    processes = {stage.pid: f"stage {stage.instance}.{stage.stage}" for stage in state.stages if stage.pid is not None}
    for engine in state.engines:
        if engine.pid is None:
            continue
        processes |= dict.fromkeys(warden.members({engine.pid}), f"engine core {engine.instance}")
        processes[engine.pid] = f"API server {engine.instance}"
    return [thread for pid, process in processes.items() for thread in threads(process, pid)]


def spent(before: Iterable[ThreadTime], after: Iterable[ThreadTime]) -> list[ThreadTime]:
    """What each thread that is there after it used meanwhile."""
    had = {(thread.pid, thread.thread): thread.seconds for thread in before}
    return [
        ThreadTime(
            thread.process,
            thread.pid,
            thread.thread,
            thread.niceness,
            thread.seconds - had.get((thread.pid, thread.thread), 0.0),
        )
        for thread in after
    ]


def by_process(times: Iterable[ThreadTime]) -> dict[str, float]:
    """Seconds of all threads but those that replicate."""
    found: dict[str, float] = {}
    for thread in times:
        if not thread.replicates:
            found[thread.process] = found.get(thread.process, 0.0) + thread.seconds
    return found


def by_task(times: Sequence[ThreadTime], sending: int, keeping: int) -> dict[str, float]:
    """Seconds of the threads that replicate the blocks of instance ``sending``, which instance ``keeping`` keeps.

    Only that instance may replicate. A sending stage then has two such threads, and the one that sends is the elder,
    because it starts the one that takes answers.
    """
    found = {"sender": 0.0, "answers": 0.0, "keeper": 0.0}
    for process in sorted({thread.process for thread in times}):
        replicating = sorted((t for t in times if t.process == process and t.replicates), key=lambda t: t.thread)
        if process.startswith(f"stage {sending}."):
            for place, thread in enumerate(replicating):
                found["sender" if place == 0 else "answers"] += thread.seconds
        elif process.startswith(f"stage {keeping}."):
            found["keeper"] += sum(thread.seconds for thread in replicating)
    return found
