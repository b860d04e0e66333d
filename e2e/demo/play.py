"""The demo from nothing to the last figure. Each step is a method; what they need of each other is in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from resilientllm_cli.streams import Sampling, Stream

from e2e.cluster.errors import ClusterError
from e2e.cluster.launch import REPOSITORY
from e2e.cluster.machine_files import default_mounts
from e2e.cluster.provider import Cluster, Provider
from e2e.cluster.timings import PATIENT

from . import bytecode, installation, victim
from .observation import Observation, observe, waits_for
from .prompts import prompts
from .report import Kill, Outcome
from .screen import Screen
from .traffic import Traffic
from .waiting import wait_for

OBJECT = "tiny"

_READY_TIMEOUT_SECONDS = 900.0
_STREAMS_TIMEOUT_SECONDS = 600.0
_WHOLE_TIMEOUT_SECONDS = 300.0
_LOOK_SECONDS = 1.0
_GLANCE_SECONDS = 0.1
_FIRST_TOKENS = 16
"""Every stream has so many before the kill: all of them are in decode."""
_SHARE_BEFORE_KILL = 0.25


@dataclass(frozen=True)
class Settings:
    nodes: int = 3
    streams: int = 8
    tokens: int = 600
    """By each stream."""
    stage: int = 1
    """Which stage of an instance is killed."""
    built_images: bool = False
    """Built with Docker from the Dockerfiles; else images that run the files of this machine."""


class Play:
    def __init__(
        self, provider: Provider, provider_name: str, models: Path, settings: Settings, screen: Screen
    ) -> None:
        self._provider = provider
        self._provider_name = provider_name
        self._models = models
        self._settings = settings
        self._screen = screen
        self._told: set[str] = set()

    def run(self) -> Outcome:
        self._screen.say(f"a tiny model in {self._models}")
        installation.make_model(self._models)
        if not self._settings.built_images and not bytecode.is_compiled(bytecode.packages()):
            with self._screen.step("bytecode", "Python's packages, compiled once"):
                bytecode.compile_all(bytecode.packages())
        started = time.monotonic()
        cluster = self._bring_up()
        self._install(cluster)
        self._serve(cluster)
        ready_seconds = time.monotonic() - started
        host, port = cluster.forward(*installation.service_address(cluster, OBJECT))
        url = f"http://{host}:{port}"
        reference = self._undisturbed(cluster, url)
        delivered, kill = self._disturbed(cluster, url)
        last = self._until_whole(cluster, kill)
        return Outcome(
            sampling=self._sampling,
            reference=reference,
            delivered=delivered,
            kill=kill,
            recovery=last.status.last_recovery,
            provider=self._provider_name,
            nodes=len(cluster.nodes()),
            ready_seconds=ready_seconds,
            step_seconds=self._screen.scene.step_seconds,
            events=[f"{event.reason}: {event.note}" for event in last.events],
        )

    @property
    def _sampling(self) -> Sampling:
        return Sampling(max_tokens=self._settings.tokens)

    def _bring_up(self) -> Cluster:
        mounts = (self._models,) if self._settings.built_images else default_mounts(REPOSITORY)
        with self._screen.step("cluster", f"a Kubernetes of {self._settings.nodes} nodes ({self._provider_name})"):
            return self._provider.up(self._settings.nodes, mounts=mounts, timings=PATIENT)

    def _install(self, cluster: Cluster) -> None:
        with self._screen.step("images", "the images of operator and worker, on every node"):
            load = installation.load_built_images if self._settings.built_images else installation.load_thin_images
            load(cluster)
        with self._screen.step("operator", "kubectl apply -k manifests/base"):
            installation.install_operator(cluster)
        with self._screen.step("model", "kubectl apply -f manifests/examples/models-pv.yaml"):
            installation.provide_model(cluster, self._models)

    def _serve(self, cluster: Cluster) -> None:
        with self._screen.step("ready", "kubectl apply -f manifests/examples/tiny.yaml, until it is Ready"):
            installation.apply(cluster, [installation.example()])
            self._wait(cluster, "Ready", lambda seen: seen.ready, _READY_TIMEOUT_SECONDS)

    def _undisturbed(self, cluster: Cluster, url: str) -> list[Stream]:
        with self._screen.step("reference", f"{self._settings.streams} streams through the Service, undisturbed"):
            traffic = self._start(url)
            self._watch(traffic, until=lambda: False)
        return traffic.streams

    def _disturbed(self, cluster: Cluster, url: str) -> tuple[list[Stream], Kill]:
        """The same streams again, and a kill when all of them are in the middle."""
        before = observe(cluster, installation.NAMESPACE, OBJECT)
        stages = victim.candidates(cluster, before, self._settings.stage, installation.NAMESPACE)
        engines = victim.engine_ports(cluster, before)
        with self._screen.step("streams", "the same streams, and kill -9 of one stage in the middle"):
            traffic = self._start(url)
            self._watch(traffic, until=lambda: self._in_the_middle(traffic))
            running = victim.running_requests(engines)
            chosen = stages[victim.busiest(running)]
            kill = Kill(
                instance=chosen.pod.instance,
                stage=self._settings.stage,
                pod=chosen.pod.name,
                running=running,
                at=datetime.now(UTC),
                at_monotonic_seconds=time.monotonic(),
            )
            victim.kill(chosen)
            self._screen.scene.kill = kill
            self._screen.say(
                f"kill -9 of {chosen.pod.place} (pod {chosen.pod.name}, pid {chosen.pid}); "
                f"its instance was serving {running[chosen.pod.instance]} streams"
            )
            self._watch(traffic, until=lambda: False, look=lambda: self._look(observe_now(cluster)))
        return traffic.streams, kill

    def _until_whole(self, cluster: Cluster, kill: Kill) -> Observation:
        def whole(seen: Observation) -> bool:
            recovery = seen.status.last_recovery
            return (
                seen.whole and recovery is not None and recovery.detected_at >= kill.at and bool(recovery.restored_at)
            )

        with self._screen.step("whole", "until the killed stage is back in its place"):
            return self._wait(cluster, "Ready, and not Degraded", whole, _WHOLE_TIMEOUT_SECONDS)

    def _start(self, url: str) -> Traffic:
        traffic = Traffic(url, prompts(self._settings.streams), self._sampling)
        self._screen.scene.streams = traffic.streams
        self._screen.scene.tokens_wanted = self._settings.tokens
        return traffic

    def _in_the_middle(self, traffic: Traffic) -> bool:
        enough = _SHARE_BEFORE_KILL * self._settings.tokens * self._settings.streams
        return traffic.least_tokens >= _FIRST_TOKENS and traffic.tokens >= enough

    def _watch(self, traffic: Traffic, *, until: Callable[[], bool], look: Callable[[], None] = lambda: None) -> None:
        """Until the streams are over, or something is true of them."""
        deadline = time.monotonic() + _STREAMS_TIMEOUT_SECONDS
        next_look = time.monotonic()
        while not traffic.wait(_GLANCE_SECONDS) and not until():
            now = time.monotonic()
            if now > deadline:
                raise ClusterError(
                    expected=f"all streams to end within {_STREAMS_TIMEOUT_SECONDS:g} s",
                    found=f"{traffic.tokens} of {self._settings.tokens * self._settings.streams} tokens",
                    remedy="see the logs of the engines, or ask for fewer tokens: --tokens",
                )
            if now >= next_look:
                look()
                next_look = now + _LOOK_SECONDS
                self._screen.waits_for_tokens(traffic.tokens, self._settings.tokens * self._settings.streams)

    def _wait(
        self, cluster: Cluster, what: str, reached: Callable[[Observation], bool], timeout_seconds: float
    ) -> Observation:
        def look(seen: Observation) -> None:
            self._look(seen)
            self._screen.waits_for(waits_for(seen))

        return wait_for(
            cluster,
            installation.NAMESPACE,
            OBJECT,
            what,
            reached,
            timeout_seconds=timeout_seconds,
            on_look=look,
        )

    def _look(self, seen: Observation) -> None:
        scene = self._screen.scene
        scene.seen = seen
        if scene.kill is not None:
            recovery = seen.status.last_recovery
            if recovery is not None and recovery.detected_at >= scene.kill.at:
                scene.recovery = recovery
        for event in seen.events:
            if event.uid not in self._told:
                self._told.add(event.uid)
                self._screen.say(f"event {event.reason}: {event.note}")


def observe_now(cluster: Cluster) -> Observation:
    return observe(cluster, installation.NAMESPACE, OBJECT)
