"""A world: instances of the tiny model as real processes, each in a network namespace of its own, on a small disk."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from resilientllm_api.engine_state import EngineState
from resilientllm_api.pairing import make_plans
from resilientllm_api.plan import Limits, StageId

from resilientllm_cli.chaos import clock, stage_program
from resilientllm_cli.chaos.network import Network, run
from resilientllm_cli.chaos.processes import Processes, Start
from resilientllm_cli.chaos.relay import RELAY_PORT, Relay
from resilientllm_cli.chaos.shape import Shape
from resilientllm_cli.local import environment, observe, preflight
from resilientllm_cli.local.cluster import NAME
from resilientllm_cli.local.flags import with_defaults
from resilientllm_cli.local.layout import (
    Endpoints,
    EngineEndpoints,
    Files,
    Layout,
    StageEndpoints,
    engine_name,
    programs,
    stage_name,
)

STAGE_PORT, HEALTH_PORT, API_PORT, CONTROL_PORT = 7000, 7001, 8000, 8001
DISK_BYTES = 256 << 20
WHOLE_SECONDS = 240.0
"""For all processes to load and attach, at the start. After a fault, see ``run.py``."""
POLL_SECONDS = 0.05
FLAGS = ("--kv-cache-memory-bytes", str(64 << 20), "--max-num-batched-tokens", "512", "--max-model-len", "2048")
IMPORTED = (
    "resilientllm_worker.stage.main",
    "resilientllm_worker.stage.server",
    "resilientllm_worker.engine.main",
    "resilientllm_worker.engine.control_server",
    "resilientllm_worker.engine.executor",
    "resilientllm_worker.engine.scheduler",
    "resilientllm_worker.engine.leaving",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.model_executor.models.llama",
    "vllm.v1.engine.core",
    "vllm.v1.engine.utils",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
)
NO_GROWTH = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
"""Else oneDNN keeps something for every number of tokens that a step had, up to 1024 times: hundreds of MiB, in which
no leak would be seen. Each layer remembers the last 32 of them anyhow."""
STAGE_ENTRY = "resilientllm_cli.chaos.stage_program:main"
ENGINE_ENTRY = "resilientllm_cli.chaos.engine_program:main"


class World:
    """Raises TimeoutError on entry if it does not become whole."""

    def __init__(
        self,
        shape: Shape,
        model: Path,
        network: Network,
        disk: Path,
        logs: Path,
        relayed: StageId | None = None,
        limits: Limits | None = None,
    ) -> None:
        """``disk``: an empty folder, where its small disk is mounted. ``logs``: where logs are kept when it ends.

        ``relayed``: what comes to this stage passes a relay.
        """
        self.shape = shape
        self.name = f"{shape}-{secrets.token_hex(4)}"
        self.network = network
        self.disk = disk
        self.relayed = relayed
        self.relay: Relay | None = None
        self._logs = logs
        self._limits = limits or Limits()
        self._token = secrets.token_urlsafe(32)
        self.layout = Layout(
            model=model.absolute(), instances=shape.instances, stages=shape.stages, directory=disk, extra_flags=FLAGS
        )
        self.files = Files(disk)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            run("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(self.disk))
            stack.callback(run, "umount", "--lazy", str(self.disk))
            stack.callback(self._keep_logs)
            stack.callback(self.network.remove_all)
            self.endpoints = self._endpoints()
            self._write_files()
            if self.relayed is not None:
                host = stage_name(self.relayed)
                self.relay = Relay(self.network, host, f"{self.network.address(host)}:{STAGE_PORT}")
                stack.enter_context(self.relay)
                stack.enter_context(self.network.redirected(host, STAGE_PORT, RELAY_PORT))
            of_children = environment.of_children(os.environ, self.layout, gpu=False)
            of_children |= {"TMPDIR": str(self.disk), **NO_GROWTH, **clock.preload(self.disk)}
            self.processes = Processes(self._starts(of_children), IMPORTED, of_children, self.files.log("zygote"))
            stack.enter_context(self.processes)
            self.wait_whole(WHOLE_SECONDS)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def _endpoints(self) -> Endpoints:
        add = self.network.add
        stages = {stage: add(stage_name(stage), self.shape.node_of(stage)) for stage in self.shape.stage_ids()}
        engines = {instance: add(engine_name(instance), node=instance) for instance in range(self.shape.instances)}
        return Endpoints(
            {stage: StageEndpoints(f"{ip}:{STAGE_PORT}", f"{ip}:{HEALTH_PORT}") for stage, ip in stages.items()},
            {instance: EngineEndpoints(ip, API_PORT, f"{ip}:{CONTROL_PORT}") for instance, ip in engines.items()},
        )

    def _write_files(self) -> None:
        for folder in ("logs", "plans", "orders", "clocks"):
            (self.disk / folder).mkdir()
        self.files.token.write_text(self._token)
        addresses = {stage: at.address for stage, at in self.endpoints.stages.items()}
        plans = make_plans(NAME, 1, self.shape.instances, self.shape.stages, addresses, self._limits)
        for instance, plan in plans.items():
            self.files.plan(instance).write_text(plan.model_dump_json(by_alias=True, indent=2) + "\n")

    def _starts(self, of_children: dict[str, str]) -> list[Start]:
        flags = with_defaults(FLAGS, environment.default_flags(preflight.read_shape(self.layout.model), gpu=False))
        names = {name: name for name in ("resilientllm-stage", "resilientllm-engine")}
        starts = []
        for program in programs(self.layout, self.endpoints, names, flags, of_children):
            temporary = self.disk / "tmp" / program.name
            temporary.mkdir(parents=True)
            own = {"TMPDIR": str(temporary), stage_program.ORDER_FILE: str(self.order_file(program.name))}
            starts.append(
                Start(
                    name=program.name,
                    entry=STAGE_ENTRY if program.name.startswith("stage") else ENGINE_ENTRY,
                    arguments=tuple(program.arguments),
                    environment={**program.environment, **own, **clock.setting(self.clock_file(program.name))},
                    namespace=str(self.network.namespace(program.name)),
                    log=str(program.log),
                    clock=str(self.clock_file(program.name)) if clock.LIBRARY in of_children else None,
                )
            )
        return starts

    def _keep_logs(self) -> None:
        shutil.rmtree(self._logs, ignore_errors=True)
        if not (self.disk / "logs").is_dir():
            return  # it did not come so far
        shutil.copytree(self.disk / "logs", self._logs)

    # What it is.

    def order_file(self, name: str) -> Path:
        return self.disk / "orders" / name

    def clock_file(self, name: str) -> Path:
        return self.disk / "clocks" / name

    def url(self, instance: int) -> str:
        return self.endpoints.engines[instance].url

    def engine_state(self, instance: int) -> EngineState | None:
        return observe.engine_state(self.endpoints.engines[instance].control_url, self._token)

    def names(self) -> list[str]:
        return [stage_name(stage) for stage in self.shape.stage_ids()] + [
            engine_name(instance) for instance in range(self.shape.instances)
        ]

    def kv_in_use(self, instance: int) -> float:
        """The share of its KV blocks that requests of an instance hold, as its engine says."""
        return observe.metric(self.url(instance), "vllm:kv_cache_usage_perc")

    def lacks(self) -> str:
        """What keeps it from being whole; empty if it is: all instances on their own stages, all places kept, idle."""
        for instance in range(self.shape.instances):
            state = self.engine_state(instance)
            if state is None:
                return f"engine {instance} does not answer"
            if not (state.serving and state.on_own_stages):
                return f"instance {instance} is {state.phase} {state.message}".strip()
            if state.requests_running or state.requests_waiting:
                return f"instance {instance} has {state.requests_running} + {state.requests_waiting} requests"
            for place in state.replication:
                if place.kept_by is None or not place.healthy:
                    return f"nobody keeps the blocks of {instance}.{place.stage}: {place.message}"
            if not observe.api_answers(self.url(instance)):
                return f"the API of engine {instance} does not answer"
        for stage in self.shape.stage_ids():
            if observe.stage_rank_pids(self.endpoints.stages[stage].health) is None:
                return f"stage {stage} is not ready"
        return ""

    def wait_whole(self, timeout_seconds: float) -> float:
        """Returns how long it took. Raises TimeoutError, with what is missing."""
        began = time.monotonic()
        while lacks := self.lacks():
            if time.monotonic() - began > timeout_seconds:
                raise TimeoutError(f"not whole within {timeout_seconds:g} s: {lacks}")
            time.sleep(POLL_SECONDS)
        return time.monotonic() - began

    def order(self, stage: StageId, order: stage_program.Order) -> int:
        """Hand an order to a stage's process; its pid."""
        stage_program.write(self.order_file(stage_name(stage)), order)
        return self.processes.signal(stage_name(stage), signal.SIGUSR1)

    def wait_carried_out(self, stage: StageId, timeout_seconds: float) -> float:
        """When it was, on the monotonic clock. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_seconds
        while (at := stage_program.carried_out(self.order_file(stage_name(stage)))) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"stage {stage} has not carried out its order: no step came")
            time.sleep(0.005)
        return at
