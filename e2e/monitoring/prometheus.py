"""A real Prometheus in a cluster's network, which finds and scrapes pods as the shipped PodMonitors say."""

from __future__ import annotations

import json
import math
import threading
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from e2e.cluster import cgroups, launch, network
from e2e.cluster.commands import wait_until
from e2e.cluster.errors import ClusterError, CommandFailed
from e2e.cluster.namespaces import NamespaceCluster

from .programs import program
from .scraping import configuration, discovered, rules

SCRAPE_SECONDS = 2.0
_PORT = 9090
_LOOK_SECONDS = 3.0
_START_TIMEOUT_SECONDS = 120.0
_TIMEOUT_SECONDS = 60.0

Json = dict[str, Any]


@dataclass(frozen=True)
class Series:
    labels: dict[str, str]
    points: tuple[tuple[float, float], ...]
    """Seconds since the epoch, and what it was then; nothing that is not a number."""


class Prometheus:
    """Its process ends with the cluster, whose network and control group it lives in; looking for pods ends with the
    block."""

    def __init__(self, cluster: NamespaceCluster) -> None:
        """Returns when it is ready to scrape."""
        layout = cluster.layout
        self._cluster = cluster
        self._folder = folder = layout.folder / "prometheus"
        folder.mkdir()
        rules_file, config = folder / "rules.yaml", folder / "prometheus.yaml"
        rules_file.write_text(yaml.safe_dump(rules()))
        config.write_text(yaml.safe_dump(configuration(self._targets_file, rules_file, SCRAPE_SECONDS)))
        self._discover()
        log = folder / "log"
        launch.spawn(
            [
                str(program("prometheus")),
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{_PORT}",
            ],
            group=f"{layout.prefix}/{cgroups.HOST_SIDE}",
            netns=network.netns_file(layout.fabric),
            log=log,
        )
        at = cluster.forward("127.0.0.1", _PORT)
        self._url = f"http://{at.host}:{at.port}"
        wait_until(
            self._is_ready, "Prometheus to be ready", timeout_seconds=_START_TIMEOUT_SECONDS, where_to_look=[log]
        )
        self._over = threading.Event()
        self._looking = threading.Thread(target=self._keep_looking, name="discovery")

    @property
    def _targets_file(self) -> Path:
        return self._folder / "targets.json"

    def __enter__(self) -> Self:
        self._looking.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._looking.join()

    def _keep_looking(self) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            with suppress(CommandFailed):  # the API server is busy, or away: what was found holds
                self._discover()

    def _discover(self) -> None:
        found = json.loads(self._cluster.kubectl("get", "pods", "--all-namespaces", "--output=json"))
        unfinished = self._targets_file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(discovered(found["items"])))
        unfinished.replace(self._targets_file)

    def at(self, expression: str, time: float) -> list[Series]:
        """What an expression is at a moment, in seconds since the epoch."""
        data = self._get("/api/v1/query", query=expression, time=f"{time:.3f}")
        return _without_gaps((each["metric"], [each["value"]]) for each in data["result"])

    def over(self, expression: str, start: float, end: float, step_seconds: float) -> list[Series]:
        """What an expression was from ``start`` to ``end``, in seconds since the epoch."""
        data = self._get(
            "/api/v1/query_range",
            query=expression,
            start=f"{start:.3f}",
            end=f"{end:.3f}",
            step=f"{step_seconds:g}",
        )
        return _without_gaps((each["metric"], each["values"]) for each in data["result"])

    def rules(self) -> list[Json]:
        """Recording rules and alerts, with what became of their last evaluation."""
        return [rule for group in self._get("/api/v1/rules")["groups"] for rule in group["rules"]]

    def targets(self) -> list[Json]:
        return list(self._get("/api/v1/targets", state="active")["activeTargets"])

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=_TIMEOUT_SECONDS) as answer:
                return int(answer.status) == 200
        except OSError:
            return False

    def _get(self, path: str, **parameters: str) -> Json:
        url = f"{self._url}{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as answer:
                data: Json = json.load(answer)["data"]
        except urllib.error.HTTPError as refused:
            raise ClusterError(
                expected=f"an answer of Prometheus to {parameters}",
                found=refused.read().decode(errors="replace"),
                remedy="mend the expression",
            ) from refused
        return data


def _without_gaps(results: Any) -> list[Series]:
    found = (
        Series(labels, tuple((float(time), float(value)) for time, value in values if math.isfinite(float(value))))
        for labels, values in results
    )
    return [series for series in found if series.points]
