"""A local cluster as a context manager: what `resilientllm local up`, the benchmarks and the kill tests share.

with local_cluster(model, instances=2, stages=3) as cluster:
    cluster.wait_ready()
    cluster.kill_stage(0, 1)
"""

from __future__ import annotations

import fcntl
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from resilientllm_api.crd import WeightsSource
from resilientllm_api.engine_state import EngineState
from resilientllm_api.pairing import make_plans
from resilientllm_api.plan import Limits, ReplicationMode, StageId

from resilientllm_cli.errors import UsageError
from resilientllm_cli.local import environment, observe, ports, preflight, state
from resilientllm_cli.local.flags import with_defaults
from resilientllm_cli.local.layout import (
    Endpoints,
    EngineEndpoints,
    Files,
    Layout,
    engine_name,
    place,
    ports_needed,
    programs,
    stage_name,
)
from resilientllm_cli.local.observe import StageWeights
from resilientllm_cli.local.state import LocalState, StageEntry
from resilientllm_cli.supervise.supervisor import Phase, Supervisor

NAME = "local"
POLL_SECONDS = 0.25
STAGE_END_SECONDS = 30.0
"""Only a bound: on a busy machine rank 0 may take a moment to see that another rank has ended."""


class ClusterFailed(Exception):
    """A process refused its configuration. The message is its own last line."""


class LocalCluster:
    """Raises UsageError on entry, before anything is started, for what can be known to be wrong."""

    def __init__(
        self,
        layout: Layout,
        on_change: Callable[[LocalState | None, LocalState], None] = lambda before, after: None,
        limits: Limits | None = None,
        executables: Mapping[str, str] | None = None,
    ) -> None:
        """``on_change`` gets the state before and after, one call at a time. ``executables``: instead of the found."""
        self.layout = layout
        self.files = Files(layout.directory.absolute())
        self._on_change = on_change
        self._limits = limits or Limits()
        self._executables = executables
        self._token = secrets.token_urlsafe(32)
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._published = threading.Condition()
        self._state: LocalState | None = None
        self._failure: Exception | None = None
        self._ranks: dict[StageId, tuple[int, tuple[int, ...]]] = {}
        """A ready stage's process and its ranks: what one process said does not hold for its successor."""
        self._engine_states: dict[int, EngineState | None] = {}
        self._answering: dict[int, int] = {}
        """An engine's process whose API has answered."""

    # Life.

    def __enter__(self) -> Self:
        layout = self.layout
        shape = preflight.read_shape(layout.model)
        preflight.check_layout(layout, shape)
        preflight.check_ports(layout, ports.is_free)
        executables = self._executables or preflight.executables()
        with ExitStack() as stack:
            stack.enter_context(_only_run_of(self.files))
            self.endpoints: Endpoints = place(
                layout, ports.HOST, ports.choose(ports_needed(layout), ports.candidates())
            )
            self._write_files()
            self._supervisor = stack.enter_context(
                Supervisor(
                    programs(
                        layout,
                        self.endpoints,
                        executables,
                        with_defaults(layout.extra_flags, environment.default_flags(shape)),
                        environment.of_children(os.environ, layout),
                    ),
                    on_change=lambda status: self._wake.set(),
                )
            )
            self._publish()
            observer = threading.Thread(target=self._observe, name="observer")
            observer.start()
            stack.callback(observer.join)
            stack.callback(self._stop_observing)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()
        self._publish()

    def _stop_observing(self) -> None:
        self._closing.set()
        self._wake.set()

    def _write_files(self) -> None:
        files = self.files
        for old_log in files.log("any").parent.glob("*.log"):
            old_log.unlink()
        files.token.unlink(missing_ok=True)
        descriptor = os.open(files.token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as token_file:
            token_file.write(self._token)
        addresses = {stage: at.address for stage, at in self.endpoints.stages.items()}
        layout = self.layout
        plans = make_plans(NAME, 1, layout.instances, layout.stages, addresses, self._limits, layout.replication)
        for instance, plan in plans.items():
            path = files.plan(instance)
            path.parent.mkdir(exist_ok=True)
            path.write_text(plan.model_dump_json(by_alias=True, indent=2) + "\n")

    # What it is.

    @property
    def token(self) -> str:
        """Of the engines' control servers and the stages' ports."""
        return self._token

    @property
    def engines(self) -> tuple[EngineEndpoints, ...]:
        return tuple(self.endpoints.engines.values())

    def state(self) -> LocalState:
        """As of now, as far as processes go; what engines say is at most ``POLL_SECONDS`` old."""
        return self._publish()

    def engine_state(self, instance: int) -> EngineState | None:
        """What the engine says now; None if it does not answer."""
        return observe.engine_state(self.endpoints.engines[instance].control_url, self._token)

    def stage_counts(self, instance: int, stage: int) -> dict[str, int] | None:
        """What the stage's process has done so far (`observe.stage_counts`); None if it does not answer."""
        return observe.stage_counts(self.endpoints.stages[StageId(instance=instance, stage=stage)].health)

    def stage_weights(self, instance: int, stage: int) -> StageWeights | None:
        """Where the stage's process has its weights from; None if it is not ready."""
        return observe.stage_weights(self.endpoints.stages[StageId(instance=instance, stage=stage)].health)

    def stage(self, instance: int, stage: int, rank: int = 0) -> StageEntry:
        for entry in self.state().stages:
            if (entry.instance, entry.stage, entry.rank) == (instance, stage, rank):
                return entry
        raise KeyError(f"there is no rank {rank} of stage {instance}.{stage}")

    def log(self, name: str) -> str:
        """All that a process wrote, by its name: ``stage-0.1``, ``engine-0``."""
        path = self.files.log(name)
        return path.read_text(errors="replace") if path.is_file() else ""

    # Waiting and killing.

    def wait_ready(self, timeout_seconds: float = 180.0) -> LocalState:
        return self.wait_for(lambda now: now.ready, timeout_seconds, "every instance on its own stages")

    def wait_for(
        self, holds: Callable[[LocalState], bool], timeout_seconds: float, what: str = "the condition"
    ) -> LocalState:
        """Raises ClusterFailed when a process refused its configuration, TimeoutError with the state found."""
        deadline = time.monotonic() + timeout_seconds
        now = self._publish()
        with self._published:
            while not holds(now):
                self.check()
                if (left := deadline - time.monotonic()) <= 0:
                    raise TimeoutError(f"expected {what} within {timeout_seconds:g} s, found {_summary(now)}")
                self._published.wait(left)
                assert self._state is not None
                now = self._state
        return now

    def kill_stage(self, instance: int, stage: int, rank: int = 0) -> int:
        """kill -9 of one rank; rank 0 is the stage's main process, as of a container. Returns its pid when the stage,
        which ends as one, is seen dead. Raises ProcessLookupError when it has no such rank now, TimeoutError when the
        stage outlives it."""
        if rank == 0:
            return self._kill(stage_name(StageId(instance=instance, stage=stage)))
        pid = self.stage(instance, stage, rank).pid
        if pid is None:
            raise ProcessLookupError(f"rank {rank} of stage {instance}.{stage} is not running")
        os.kill(pid, signal.SIGKILL)
        self.wait_for(
            lambda now: all(entry.pid != pid for entry in now.stages),
            STAGE_END_SECONDS,
            f"stage {instance}.{stage} to end with its rank {rank}",
        )
        return pid

    def kill_engine(self, instance: int) -> int:
        return self._kill(engine_name(instance))

    def tell_engine_to_end(self, instance: int) -> int:
        """SIGTERM, as a kubelet sends it. Returns its pid; what becomes of it is to be seen."""
        return self._supervisor.kill(engine_name(instance), signal.SIGTERM)

    def engine_exit_code(self, instance: int) -> int | None:
        """How the engine's process before this one ended; None if there was none."""
        return self._supervisor.status()[engine_name(instance)].last_exit_code

    def _kill(self, name: str) -> int:
        pid = self._supervisor.kill(name)
        self._publish()
        return pid

    # Observing.

    def _observe(self) -> None:
        try:
            while not self._closing.is_set():
                self._publish()
                self._ask()
                self._publish()
                self._wake.wait(POLL_SECONDS)
                self._wake.clear()
        except Exception as failure:  # noqa: BLE001 - passed on to whoever waits.
            with self._published:
                self._failure = failure
                self._published.notify_all()

    def _ask(self) -> None:
        """A stage is asked until it is ready; from then on its process tells enough. Engines are asked always."""
        statuses = self._supervisor.status()
        for stage, stage_at in self.endpoints.stages.items():
            pid = statuses[stage_name(stage)].pid
            if pid is not None and self._ranks.get(stage, (None,))[0] != pid:
                rank_pids = observe.stage_rank_pids(stage_at.health)
                # It may have been replaced while it answered: then this was another process's answer.
                if rank_pids is not None and self._supervisor.status()[stage_name(stage)].pid == pid:
                    self._ranks[stage] = (pid, rank_pids)
                    self._supervisor.report_useful(stage_name(stage))
        for instance, engine_at in self.endpoints.engines.items():
            pid = statuses[engine_name(instance)].pid
            said = observe.engine_state(engine_at.control_url, self._token) if pid is not None else None
            self._engine_states[instance] = said
            if pid is None or said is None or not said.serving or self._answering.get(instance) == pid:
                continue
            if observe.api_answers(engine_at.url):
                self._answering[instance] = pid
                self._supervisor.report_useful(engine_name(instance))

    def _publish(self) -> LocalState:
        with self._published:
            statuses = self._supervisor.status()
            current = {
                stage: ranks
                for stage, (pid, ranks) in list(self._ranks.items())
                if statuses[stage_name(stage)].pid == pid
            }
            after = state.assemble(
                os.getpid(),
                self.endpoints,
                self.layout.tensor_parallel_size,
                statuses,
                current,
                dict(self._engine_states),
                {
                    instance
                    for instance, pid in list(self._answering.items())
                    if statuses[engine_name(instance)].pid == pid
                },
            )
            before, self._state = self._state, after
            if after != before:
                state.write(self.files.state, after)
                self._on_change(before, after)
                self._published.notify_all()
            return after

    def check(self) -> None:
        """Raises ClusterFailed when a process refused its configuration."""
        if self._failure:
            raise self._failure
        for status in self._supervisor.status().values():
            if status.phase is Phase.REFUSED:
                lines = [line for line in self.log(status.name).splitlines() if line.strip()]
                raise ClusterFailed(f"{status.name}: {lines[-1].strip() if lines else 'bad configuration'}")


@contextmanager
def _only_run_of(files: Files) -> Iterator[None]:
    """Two runs in one directory would overwrite each other's plans and state."""
    files.directory.mkdir(parents=True, exist_ok=True)
    with files.lock.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(
                f"another run uses {files.directory}: "
                "stop it with `resilientllm local down`, or choose another --directory"
            ) from error
        yield


def _summary(now: LocalState) -> str:
    stages = (f"stage {s.instance}.{s.stage} {s.phase}" for s in now.stages if s.rank == 0)
    engines = (f"engine {e.instance} {e.phase} {e.message}".strip() for e in now.engines)
    return ", ".join([*stages, *engines])


def local_cluster(
    model: Path,
    instances: int = 2,
    stages: int = 2,
    *,
    tensor_parallel_size: int = 1,
    port: int = 0,
    directory: Path = Path("build/local"),
    runner: str = "v1",
    extra_flags: Sequence[str] = (),
    stage_flags: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    replication: ReplicationMode = ReplicationMode.RING,
    weights: WeightsSource = WeightsSource.STORAGE,
    limits: Limits | None = None,
    executables: Mapping[str, str] | None = None,
) -> LocalCluster:
    """``extra_flags`` are vLLM's, for stages and engines; ``port`` 0 chooses free ports."""
    layout = Layout(
        model=model,
        instances=instances,
        stages=stages,
        tensor_parallel_size=tensor_parallel_size,
        port=port,
        directory=directory,
        runner=runner,
        extra_flags=tuple(extra_flags),
        stage_flags=tuple(stage_flags),
        env=env or {},
        replication=replication,
        weights=weights,
    )
    return LocalCluster(layout, limits=limits, executables=executables)
