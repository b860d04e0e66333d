"""What ``kubectl resilientllm`` plans and drains; its pictures are in test_status.py."""

from __future__ import annotations

import argparse
import io
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from resilientllm_api.crd import ResilientLLM
from resilientllm_cli.plugin import command, view
from resilientllm_cli.plugin.cluster import Cluster, Node
from resilientllm_cli.plugin.draining import dependants, engines
from resilientllm_cli.plugin.planned import planned
from rich.console import Console, RenderableType

from tests.cli.builders import BORROWED, instance, place, tiny

ZONE = "topology.kubernetes.io/zone"


def text(part: RenderableType) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(part)
    return out.getvalue()


class TestPlan:
    def donors(self, obj: ResilientLLM, zones: dict[str, str]) -> dict[str, list[str]]:
        nodes = {name: Node(name, {ZONE: zone}, cordoned=False) for name, zone in zones.items()}
        found, _ = planned(obj, nodes)
        return {str(stage): [str(each) for each in ranked] for stage, ranked in found.items()}

    def test_begins_with_the_pairs_that_the_operator_has_chosen(self) -> None:
        stages = [instance(i, place(i, 0, pair=f"{pair}.0"), place(i, 1)) for i, pair in enumerate((2, 0, 1))]
        assert {key: row[0] for key, row in self.donors(tiny(*stages), {}).items() if key.endswith(".0")} == {
            "0.0": "2.0",
            "1.0": "0.0",
            "2.0": "1.0",
        }

    def test_ranks_by_where_the_nodes_are(self) -> None:
        three = tiny(*(instance(i, place(i, 0, pair=None), place(i, 1)) for i in range(3)), topology_key=ZONE)
        zones = {"node-0-0": "a", "node-1-0": "a", "node-2-0": "b"}
        assert self.donors(three, zones)["0.0"] == ["1.0", "2.0"]
        assert self.donors(three, zones)["1.0"] == ["2.0", "0.0"]

    def test_counts_instances_that_are_on_their_way_out(self) -> None:
        assert len(self.donors(tiny(*(instance(i, place(i, 0), place(i, 1)) for i in range(3))), {})["0.0"]) == 2

    def test_of_an_object_without_a_status_is_the_ring(self) -> None:
        assert self.donors(tiny().model_copy(update={"status": None}), {})["0.1"] == ["1.1"]

    def test_is_shown_with_places(self) -> None:
        obj = tiny(instance(0), instance(1, place(1, 0, node=None), place(1, 1)), topology_key=ZONE)
        donors, locations = planned(obj, {"node-1-1": Node("node-1-1", {ZONE: "b"}, cordoned=False)})
        shown = text(view.plan(obj, donors, locations))
        assert "plan 4, failure domains by topology.kubernetes.io/zone" in shown
        assert "1.0 (nowhere)" in shown
        assert "1.1 (b: node-1-1)" in shown

    def test_of_one_instance_names_nobody(self) -> None:
        one = tiny(instance(0))
        alone = one.model_copy(update={"spec": one.spec.model_copy(update={"instances": 1})})
        assert "nobody" in text(view.plan(alone, *planned(alone, {})))


class FakeCluster(Cluster):
    """Shows one object after the other, and the last one for ever."""

    def __init__(self, shown: list[ResilientLLM]) -> None:
        self.shown = shown
        self.cordoned: list[str] = []

    def node(self, name: str) -> Node:
        return Node(name, {}, cordoned=False)

    def cordon(self, node: str) -> None:
        self.cordoned.append(node)

    def objects(self, namespace: str | None) -> list[ResilientLLM]:
        return [self.shown.pop(0) if len(self.shown) > 1 else self.shown[0]]


def drained(cluster: Cluster, node: str, seconds: float = 60.0) -> int:
    return command.drain(cluster, argparse.Namespace(node=node, timeout=seconds))


class TestDraining:
    @pytest.fixture(autouse=True)
    def at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(command, "DRAIN_POLL_SECONDS", 0.001)

    @pytest.mark.parametrize(
        ("node", "waits_for"),
        [
            ("node-0-0", ["place 0.0 is served by stage 0.0", "place 1.0 has its copies on stage 0.0"]),
            ("node-0-1", ["place 0.1 is served by stage 0.1", "place 1.1 is served by stage 0.1"]),
            ("node-1-1", ["place 0.1 has its copies on stage 1.1"]),
            ("node-9-9", []),
        ],
    )
    def test_waits_for_all_who_are_served_by_or_kept_on_the_node(self, node: str, waits_for: list[str]) -> None:
        assert dependants([BORROWED], node) == [f"default/tiny: {line}" for line in waits_for]

    def test_an_object_without_a_status_depends_on_nothing(self) -> None:
        assert dependants([tiny().model_copy(update={"status": None})], "node-0-0") == []

    def test_cordons_the_node_and_is_done_when_nobody_depends_on_it(self, capsys: pytest.CaptureFixture[str]) -> None:
        cluster = FakeCluster([BORROWED, BORROWED, tiny(instance(0, place(0, 0, node="node-5")))])
        assert drained(cluster, "node-0-0") == 0
        assert cluster.cordoned == ["node-0-0"]
        waits = [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines() if "waits" in line]
        assert waits == [f"waits: {line}" for line in dependants([BORROWED], "node-0-0")], "each is told once"

    def test_gives_up_in_time(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert drained(FakeCluster([BORROWED]), "node-0-0", seconds=0.001) == command.NOT_DONE
        assert "The node stays cordoned" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("changes", "obstacle"),
        [
            ({"metadata": {"annotations": {"resilientllm.dev/paused": "true"}}}, "pauses it"),
            ({"spec": {"recovery": {"mode": "Observe"}}}, "spec.recovery.mode is Observe"),
        ],
    )
    def test_says_why_nothing_will_move(
        self, changes: dict[str, dict[str, Any]], obstacle: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        fields = BORROWED.model_dump(mode="json", by_alias=True)
        stuck = ResilientLLM.model_validate(fields | {key: fields[key] | each for key, each in changes.items()})
        drained(FakeCluster([stuck]), "node-0-0", seconds=0.001)
        assert f"default/tiny does not move, because {obstacle}" in capsys.readouterr().out.replace(
            "the annotation resilientllm.dev/paused ", ""
        )

    def test_names_the_engines_on_the_node(self) -> None:
        assert engines([tiny()], "node-1") == ["default/tiny: engine 1 (tiny-1-engine-abc)"]


def kubeconfig(folder: Path, port: int) -> str:
    """Of an API server on a port of the loopback."""
    names = {"cluster": "here", "user": "me"}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": names}],
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "me", "user": {}}],
    }
    file = folder / "kubeconfig"
    file.write_text(json.dumps(config))
    return str(file)


class TestCommandLine:
    def test_a_wrong_duration_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            command.run(["drain", "node-1", "--timeout=soon"])
        assert ended.value.code == command.USAGE_ERROR
        assert "'soon' is not a duration" in capsys.readouterr().err

    @pytest.mark.parametrize("words", [["--help"], ["status", "--help"], ["plan", "--help"], ["drain", "--help"]])
    def test_helps(self, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            command.run(words)
        assert ended.value.code == 0
        assert "usage: kubectl resilientllm" in capsys.readouterr().out

    def test_an_api_server_that_does_not_answer_is_named(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]  # Closed when it is asked.
        assert command.run(["status", "--kubeconfig", kubeconfig(tmp_path, port)]) == command.USAGE_ERROR
        assert "cannot reach the API server" in capsys.readouterr().err

    def test_a_cluster_without_the_crd_is_told_from_one_without_the_object(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        class NotFound(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_error(404)

        with HTTPServer(("127.0.0.1", 0), NotFound) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                code = command.run(["status", "--kubeconfig", kubeconfig(tmp_path, server.server_port)])
            finally:
                server.shutdown()
                thread.join()
        assert code == command.USAGE_ERROR
        assert "this cluster has no resilientllms.resilientllm.dev" in capsys.readouterr().err

    def test_a_context_that_is_not_there_is_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = kubeconfig(tmp_path, 1)
        assert command.run(["status", "--kubeconfig", file, "--context=other"]) == command.USAGE_ERROR
        assert "expected one of here, found other" in capsys.readouterr().err

    def test_a_missing_kubeconfig_is_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert command.run(["status", f"--kubeconfig={tmp_path / 'none'}"]) == command.USAGE_ERROR
        assert "no usable kubeconfig" in capsys.readouterr().err
