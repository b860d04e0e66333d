"""What local mode runs, as plain data: from the user's numbers to programs. Nothing here touches the world."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from resilientllm_api.crd import WeightsSource
from resilientllm_api.plan import ReplicationMode, StageId

from resilientllm_cli.supervise.supervisor import Program

ENGINES_STOP_FIRST, STAGES_STOP_LAST = 0, 1
"""An engine that loses a stage would start a recovery; one that ends just detaches."""


@dataclass(frozen=True)
class Layout:
    """What the user asked for."""

    model: Path
    instances: int = 2
    stages: int = 2
    tensor_parallel_size: int = 1
    port: int = 8000
    """Of engine 0; engine i serves on ``port + i``. 0: any free ones."""
    directory: Path = Path("build/local")
    runner: str = "v1"
    replication: ReplicationMode = ReplicationMode.RING
    weights: WeightsSource = WeightsSource.STORAGE
    """All stages read the same disk here, so a twin is no faster, and on a CPU lending costs memory."""
    extra_flags: tuple[str, ...] = ()
    """Of ``vllm serve``, for stages and engines alike."""
    stage_flags: tuple[str, ...] = ()
    """Of ``resilientllm-stage`` only."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment of all; wins over every default."""

    def stage_ids(self) -> Iterator[StageId]:
        for instance in range(self.instances):
            for stage in range(self.stages):
                yield StageId(instance=instance, stage=stage)


@dataclass(frozen=True)
class StageEndpoints:
    address: str
    health: str


@dataclass(frozen=True)
class EngineEndpoints:
    host: str
    port: int
    control: str

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def control_url(self) -> str:
        return f"http://{self.control}"


@dataclass(frozen=True)
class Endpoints:
    """Where everything listens. Fixed for the life of a run: a restarted process comes back to its address."""

    stages: Mapping[StageId, StageEndpoints]
    engines: Mapping[int, EngineEndpoints]


@dataclass(frozen=True)
class Files:
    """The paths of a run under its directory."""

    directory: Path

    @property
    def token(self) -> Path:
        return self.directory / "token"

    @property
    def state(self) -> Path:
        return self.directory / "state.json"

    @property
    def lock(self) -> Path:
        return self.directory / "lock"

    def plan(self, instance: int) -> Path:
        return self.directory / "plans" / f"engine-{instance}.json"

    def log(self, name: str) -> Path:
        return self.directory / "logs" / f"{name}.log"


def ports_needed(layout: Layout) -> int:
    """Two for every stage, one (control) for every engine, and its API port if that is free to choose."""
    return 2 * layout.instances * layout.stages + layout.instances * (2 if layout.port == 0 else 1)


def place(layout: Layout, host: str, ports: Sequence[int]) -> Endpoints:
    """Deals out ``ports_needed`` ports."""
    supply = iter(ports)
    stages = {
        stage: StageEndpoints(address=f"{host}:{next(supply)}", health=f"{host}:{next(supply)}")
        for stage in layout.stage_ids()
    }
    engines = {
        instance: EngineEndpoints(
            host=host,
            control=f"{host}:{next(supply)}",
            port=next(supply) if layout.port == 0 else layout.port + instance,
        )
        for instance in range(layout.instances)
    }
    return Endpoints(stages, engines)


def stage_name(stage: StageId) -> str:
    return f"stage-{stage}"


def engine_name(instance: int) -> str:
    return f"engine-{instance}"


def weights_flags(layout: Layout, endpoints: Endpoints, stage: StageId) -> list[str]:
    """Addresses do not change, so a stage may be told of all its twins: those that do not listen yet refuse at once."""
    if layout.weights is WeightsSource.STORAGE:
        return []
    twins = [
        at.address
        for other, at in endpoints.stages.items()
        if other.stage == stage.stage and other.instance != stage.instance
    ]
    return ["--lend-weights", *([f"--weights-from={','.join(twins)}"] if twins else [])]


def programs(
    layout: Layout,
    endpoints: Endpoints,
    executables: Mapping[str, str],
    flags: Sequence[str],
    environment: Mapping[str, str],
) -> list[Program]:
    """``executables``: paths of ``resilientllm-stage`` and ``-engine``. ``flags``: vLLM's, with defaults."""
    files = Files(layout.directory)
    shape = [
        *("--pipeline-parallel-size", str(layout.stages)),
        *("--tensor-parallel-size", str(layout.tensor_parallel_size)),
    ]
    stages = [
        Program(
            name=stage_name(stage),
            arguments=[
                *(executables["resilientllm-stage"], str(layout.model)),
                *("--instance", str(stage.instance), "--stage", str(stage.stage)),
                *("--listen", at.address, "--health", at.health, "--token-file", str(files.token)),
                *weights_flags(layout, endpoints, stage),
                *layout.stage_flags,
                *shape,
                *flags,
            ],
            environment=environment,
            log=files.log(stage_name(stage)),
            stop_order=STAGES_STOP_LAST,
        )
        for stage, at in endpoints.stages.items()
    ]
    engines = [
        Program(
            name=engine_name(instance),
            arguments=[
                *(executables["resilientllm-engine"], str(layout.model)),
                *("--instance", str(instance), "--plan-file", str(files.plan(instance))),
                *("--control", at.control, "--token-file", str(files.token)),
                *("--host", at.host, "--port", str(at.port)),
                *shape,
                *flags,
            ],
            environment=environment,
            log=files.log(engine_name(instance)),
            stop_order=ENGINES_STOP_FIRST,
        )
        for instance, at in endpoints.engines.items()
    ]
    return [*stages, *engines]
