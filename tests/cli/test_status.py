"""The picture of who serves whom: of objects, recorded ones among them, and of local runs."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from resilientllm_api.crd import NOTHING_OBSERVED, ResilientLLM
from resilientllm_api.engine_state import EnginePhase, EngineState, RecoveryKind, ReplicationState, StageServing
from resilientllm_api.engine_state import Recovery as ToldRecovery
from resilientllm_api.pairing import make_plans
from resilientllm_api.plan import Limits, Plan, ReplicationMode, StageId
from resilientllm_cli.errors import UsageError
from resilientllm_cli.local.cluster import LocalCluster
from resilientllm_cli.local.layout import Layout
from resilientllm_cli.local.state import EngineEntry, LocalState, StageEntry
from resilientllm_cli.main import run as command_line
from resilientllm_cli.status import command, of_run
from resilientllm_cli.status.of_object import remarks, topology
from resilientllm_cli.status.picture import picture
from resilientllm_cli.status.topology import Instance, Place, Topology
from rich.console import Console

from tests.cli.builders import BORROWED, NOW, WELL, condition, instance, place, tiny

RECORDED = Path(__file__).parents[2] / "manifests" / "argocd" / "resilientllm.dev" / "ResilientLLM" / "testdata"
READY_SECONDS = 60.0


def drawn(shown: Topology, width: int = 200) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(picture(shown, NOW, width))
    return out.getvalue()


def cells(shown: Topology, width: int = 200) -> list[list[list[str]]]:
    """The grid: for each instance its cells, for each cell its lines."""
    rows: list[list[list[str]]] = []
    grids, _, _ = drawn(shown, width).partition("┃ recovery")
    for line in grids.splitlines():
        if line[:1] in "┡├":
            rows.append([])
        elif line[:1] == "│":
            texts = [each.strip() for each in line.split("│")[1:-1]]
            rows[-1] = [[*old, new] for old, new in zip(rows[-1] or [[] for _ in texts], texts, strict=True)]
    return [[[line for line in cell if line] for cell in row] for row in rows]


class TestOfAnObject:
    def test_that_is_well_says_nothing_but_facts(self) -> None:
        assert list(remarks(tiny())) == []
        assert topology(tiny()).healthy
        assert "default/tiny  2/2 instances serve  http://tiny.default.svc/v1\n" in drawn(topology(tiny()))

    def test_shows_the_pipeline_of_every_instance(self) -> None:
        first, second = cells(topology(BORROWED))
        assert first[0] == ["instance 0", "Serving", "tiny-0-engine-abc", "on node-0", "0.0 ─► 0.1"]
        assert (second[0][1], second[0][-1]) == ("Degraded", "1.0 ─► 0.1")

    def test_shows_donor_and_guest_and_who_keeps_what(self) -> None:
        (_, _, donor), (_, own, lost) = cells(topology(BORROWED))
        assert donor[:3] == ["● 0.1", "serves home and guest 1", "copies on 1.1, lag < 1 s"]
        assert own == ["● 1.0", "serves home", "copies on 0.0, lag < 1 s", "tiny-1-s0-abc", "on node-1-0"]
        assert lost[:4] == [
            "○ 1.1 not ready",
            "serves nobody",
            "donor 0.1 serves place 1.1",
            "no copies (pair 0.1)",
        ]

    def test_shows_a_place_that_nobody_serves(self) -> None:
        waits = tiny(instance(0), instance(1, place(1, 0), place(1, 1, servedBy=None), phase="Waiting"))
        row = cells(topology(waits))[1]
        assert row[0][-1] == "1.0 ─► no 1.1"
        assert "nobody serves place 1.1" in row[2]

    @pytest.mark.parametrize(("seconds", "shown"), [(None, "unknown"), (0, "< 1 s"), (4, "4 to 8 s")])
    def test_shows_the_lag_as_roughly_as_it_is_known(self, seconds: int | None, shown: str) -> None:
        assert (
            f"copies on 1.0, lag {shown}" in cells(topology(tiny(instance(0, place(0, 0, lagSeconds=seconds)))))[0][1]
        )

    def test_shows_an_engine_that_holds_an_older_plan(self) -> None:
        assert "holds plan 3 of 4" in cells(topology(tiny(instance(0, planVersion=3))))[0][0]
        assert "holds plan" not in drawn(topology(tiny()))

    def test_shows_the_last_recovery_first_and_its_phases(self) -> None:
        def recovery(minutes: int, **changes: Any) -> dict[str, Any]:
            at = (NOW - timedelta(minutes=minutes)).isoformat()
            return {"id": str(minutes), "instance": 1, "kind": "Borrow", "stages": [1], "detectedAt": at} | changes

        over = recovery(2, donor="0.1", reason="HeartbeatMissed", took="86ms", phases={"fence": 1.25, "resume": 84.8})
        lines = drawn(topology(tiny(recoveries=[recovery(90), over]))).splitlines()
        first, second = ([each.strip() for each in line.split("│")[1:6]] for line in lines if "│ Borrow" in line)
        assert first == ["Borrow (HeartbeatMissed)", "2 min", "1.1", "0.1", "86ms"]
        assert second == ["Borrow", "90 min", "1.1", "itself", "not over"]
        assert lines[-1] == "phases of the last one: fence 1.25 ms, resume 84.8 ms"

    def test_says_what_is_not_as_it_should_be_and_the_same_words_once(self) -> None:
        conditions = (
            condition("Ready", "False", "StageLost", "Stage 1.1 is lost."),
            condition("Available", "True", "SomeInstancesServing", "Requests go to 1 of 2."),
            condition("Progressing", "False", "Unschedulable", "Stage 1.1 is lost."),
            condition("ReplicationHealthy", "True", "SharedFailureDomain", "0.0 and 1.0 share [a]."),
        )
        assert list(remarks(tiny(conditions=conditions))) == [
            "Ready=False (StageLost): Stage 1.1 is lost.",
            "Available=True (SomeInstancesServing): Requests go to 1 of 2.",
            "ReplicationHealthy=True (SharedFailureDomain): 0.0 and 1.0 share [a].",
        ]
        assert "0.0 and 1.0 share [a]." in drawn(topology(tiny(conditions=conditions)))

    def test_knows_no_condition_of_a_newer_operator_and_shows_it(self) -> None:
        obj = tiny(conditions=(*WELL, condition("Overheated", "True", "Fire", "It burns.")))
        assert list(remarks(obj)) == ["Overheated=True (Fire): It burns."]

    def test_says_which_stages_are_to_leave_and_what_follows(self) -> None:
        first = place(0, 0, leaving="node node-0-0 is cordoned", successor="tiny-0-s0-def")
        obj = tiny(instance(0, first, place(0, 1, leaving="its pod has ended", warning="the node is hot")))
        assert list(remarks(obj)) == [
            "Stage 0.0 is to leave: node node-0-0 is cordoned; pod tiny-0-s0-def follows.",
            "Stage 0.1 is to leave: its pod has ended; no pod can follow yet.",
            "Stage 0.1: the node is hot.",
        ]

    def test_says_what_the_operator_remembers_and_would_do(self) -> None:
        avoided = {"name": "n1", "failures": 3, "evidence": "0.0 crashed 3 times.", "until": NOW.isoformat()}
        breaker = {"tripped": True, "at": NOW.isoformat()}
        assert list(remarks(tiny(nodes=[avoided], breaker=breaker, wouldDo=["move 0.0 off n1"]))) == [
            "No stage that works is moved, because too many stages failed at once (status.breaker).",
            "Node n1 is avoided: 0.0 crashed 3 times.",
            "Would do: move 0.0 off n1",
        ]
        assert list(remarks(tiny(breaker=breaker | {"tripped": False}))) == []

    def test_is_not_healthy_before_the_operator_has_seen_the_present_spec(self) -> None:
        behind = tiny(observedGeneration=0)
        assert not topology(behind).healthy
        assert list(remarks(behind)) == ["The operator has not seen the present spec yet."]

    def test_that_no_operator_has_seen(self) -> None:
        without_default = tiny().model_copy(update={"status": None})
        for obj in (without_default, tiny(observedGeneration=NOTHING_OBSERVED)):
            assert "see whether the operator runs" in drawn(topology(obj))
            assert not topology(obj).healthy


def recorded(name: str) -> ResilientLLM:
    return ResilientLLM.model_validate(yaml.safe_load((RECORDED / f"{name}.yaml").read_text()))


class TestOfRecordedObjects:
    """Those that the operator decides, as the health check of Argo CD has them."""

    @pytest.mark.parametrize(
        ("name", "healthy"),
        [
            ("healthy", True),
            ("paused", True),
            ("donor-stands-in", False),
            ("one-instance-waits", False),
            ("all-engines-lost", False),
            ("not-seen-yet", False),
            ("spec-changed", False),
            ("spec-unreadable", False),
            ("roll-out-stopped", False),
            ("nothing-can-replace-a-stage", False),
            ("starting", False),
        ],
    )
    def test_health(self, name: str, healthy: bool) -> None:
        assert topology(recorded(name)).healthy is healthy

    @pytest.mark.parametrize("name", sorted(path.stem for path in RECORDED.glob("*.yaml")))
    @pytest.mark.parametrize("width", [40, 80, 200])
    def test_show_every_instance_and_every_stage_at_any_width(self, name: str, width: int) -> None:
        shown = topology(recorded(name))
        text = drawn(shown, width)
        assert max(map(len, text.splitlines())) <= width
        for each in shown.instances:
            assert f"instance {each.number}" in text
            for at in each.places:
                assert f"● {at.stage}" in text or f"○ {at.stage} not ready" in text


def served(number: int, servers: Sequence[str | None]) -> Instance:
    places = (Place(f"{number}.{s}", ready=True, served_by=server) for s, server in enumerate(servers))
    return Instance(number, "Serving", True, "an-engine", None, 1, tuple(places))


@settings(max_examples=50)
@given(instances=st.integers(1, 3), stages=st.integers(1, 5), width=st.integers(80, 240), data=st.data())
def test_a_stage_serves_exactly_the_instances_whose_places_name_it(
    instances: int, stages: int, width: int, data: st.DataObject
) -> None:
    donors = st.sampled_from([None, *range(instances)])
    drawn_for = data.draw(st.lists(donors, min_size=instances * stages, max_size=instances * stages))
    servers = {
        (i, s): None if (donor := drawn_for[i * stages + s]) is None else f"{donor}.{s}"
        for i in range(instances)
        for s in range(stages)
    }
    shown = Topology(
        "ns/name",
        healthy=True,
        summary="",
        instances=tuple(served(i, [servers[i, s] for s in range(stages)]) for i in range(instances)),
    )
    grid = cells(shown, width)
    # Stages that do not fit side by side follow below, in the same order.
    seen = {cell[0].removeprefix("● "): cell[1] for row in grid for cell in row[1:]}
    for i in range(instances):
        for s in range(stages):
            tenants = sorted((n for n in range(instances) if servers[n, s] == f"{i}.{s}"), key=lambda n: (n != i, n))
            words = " and ".join("home" if n == i else f"guest {n}" for n in tenants) or "nobody"
            assert seen[f"{i}.{s}"] == f"serves {words}"


def entry(number: int, **changes: Any) -> EngineEntry:
    fields: dict[str, Any] = {
        "instance": number,
        "url": f"http://127.0.0.1:{8000 + number}",
        "pid": 10 + number,
        "control_url": f"http://127.0.0.1:{9000 + number}",
        "phase": "Serving",
        "message": "",
        "on_own_stages": True,
        "restarts": 0,
    }
    return EngineEntry(**fields | changes)


def process(number: int, stage: int, *, ready: bool = True, rank: int = 0) -> StageEntry:
    phase = "Ready" if ready else "Loading"
    return StageEntry(number, stage, rank, 100 + 10 * number + stage, f"127.0.0.1:{number}{stage}", ready, phase, 0)


def plans() -> list[Plan]:
    addresses = {StageId(instance=i, stage=s): f"127.0.0.1:1{i}{s}" for i in range(2) for s in range(2)}
    return list(make_plans("local", 1, 2, 2, addresses, Limits(), ReplicationMode.RING).values())


def says(number: int, lost_stage: int | None = None, **changes: Any) -> EngineState:
    def server(stage: int) -> StageId:
        return StageId(instance=1 - number if stage == lost_stage else number, stage=stage)

    fields: dict[str, Any] = {
        "instance": number,
        "phase": EnginePhase.SERVING if lost_stage is None else EnginePhase.DEGRADED,
        "serving": True,
        "plan_version": 1,
        "stages": tuple(StageServing(stage=s, served_by=server(s), own_connected=s != lost_stage) for s in range(2)),
        "replication": (
            ReplicationState(stage=0, kept_by=StageId(instance=1 - number, stage=0), healthy=True, lag_seconds=5.5),
            ReplicationState(stage=1, message="nobody is left to keep copies"),
        ),
    }
    return EngineState(**fields | changes)


class TestOfALocalRun:
    def test_shows_what_its_engines_say(self) -> None:
        borrow = ToldRecovery(
            id="1",
            kind=RecoveryKind.BORROW,
            stages=(1,),
            served_by=(StageId(instance=1, stage=0), StageId(instance=0, stage=1)),
            detected_at=NOW,
            resumed_at=NOW + timedelta(milliseconds=87),
            phases_ms={"fence": 1.0, "stitch": 5.0, "resume": 81.0, "total": 87.0},
            requests=2,
        )
        now = LocalState(
            ready=False,
            pid=1,
            engines=(entry(0), entry(1, phase="Degraded", on_own_stages=False)),
            stages=(process(0, 0), process(0, 1), process(1, 0), process(1, 1, ready=False)),
        )
        shown = of_run.topology("build/local", now, {0: says(0), 1: says(1, 1, recoveries=(borrow,))}, plans())
        (_, kept, donor), (engine, _, lost) = cells(shown)
        assert kept[:3] == ["● 0.0", "serves home", "copies on 1.0, lag 4 to 8 s"]
        assert donor == ["● 0.1", "serves home and guest 1", "no copies (pair 1.1)", "pid 101"]
        assert engine == ["instance 1", "Degraded", "http://127.0.0.1:8001", "1.0 ─► 0.1"]
        assert lost[:3] == ["○ 1.1 not ready", "serves nobody", "donor 0.1 serves place 1.1"]
        assert "build/local  2/2 instances serve" in drawn(shown)
        assert shown.remarks == (
            "Place 0.1: nobody is left to keep copies",
            "Place 1.1: nobody is left to keep copies",
            "Stage 1.1: Loading.",
        )
        assert (shown.recoveries[0].donor, shown.recoveries[0].took) == ("0.1", "87ms")
        assert drawn(shown).endswith("phases of the last one: fence 1 ms, stitch 5 ms, resume 81 ms\n")

    def test_shows_an_engine_that_does_not_answer(self) -> None:
        now = LocalState(False, 1, (entry(0, phase="Backoff", on_own_stages=False),), (process(0, 0), process(0, 1)))
        shown = of_run.topology("build/local", now, {0: None}, plans()[:1])
        assert cells(shown)[0][0] == ["instance 0", "Backoff", "http://127.0.0.1:8000", "no 0.0 ─► no 0.1"]
        assert shown.remarks == ("Engine 0 does not answer: its process is Backoff.",)

    def test_shows_a_stage_of_several_ranks_once(self) -> None:
        stages = (process(0, 0), process(0, 0, ready=False, rank=1), process(0, 1))
        shown = of_run.topology("build/local", LocalState(False, 1, (entry(0),), stages), {0: says(0)}, plans()[:1])
        assert [each.stage for each in shown.instances[0].places] == ["0.0", "0.1"]
        assert "Stage 0.0 rank 1: Loading." in shown.remarks

    def test_reads_its_files_and_asks_its_engines(
        self, tiny_model: Path, tmp_path: Path, fake_executables: dict[str, str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        directory = tmp_path / "run"
        layout = Layout(model=tiny_model, instances=2, stages=2, port=0, directory=directory)
        words = ["status", "--local", f"--directory={directory}", "--json"]
        with LocalCluster(layout, executables=fake_executables) as cluster:
            cluster.wait_ready(READY_SECONDS)
            assert command_line(words) == 0
            (item,) = json.loads(capsys.readouterr().out)["items"]
            assert (item["healthy"], item["summary"]) == (True, "2/2 instances serve")
            assert [each["places"][1]["kept_by"] for each in item["instances"]] == ["1.1", "0.1"]
            assert [each["places"][0]["pair"] for each in item["instances"]] == ["1.0", "0.0"]
        assert command_line(words) == 2
        assert "nothing runs in" in capsys.readouterr().err


class Scripted:
    """Looks that end with Ctrl-C."""

    def __init__(self, *seen: Topology | Exception) -> None:
        self.seen = list(seen)

    def __call__(self) -> Sequence[Topology]:
        if not self.seen:
            raise KeyboardInterrupt
        found = self.seen.pop(0)
        if isinstance(found, Exception):
            raise found
        return [found]


GOOD, BAD = topology(tiny()), topology(BORROWED)
BAD_CONDITIONS = (condition("Ready", "True", "AllInstancesServing", ""), condition("Degraded", "True", "Lost", "Lost."))


class TestShowing:
    @pytest.mark.parametrize(("seen", "code"), [((GOOD,), 0), ((topology(tiny(conditions=BAD_CONDITIONS)),), 1)])
    def test_the_exit_code_says_whether_all_is_well(self, seen: tuple[Topology, ...], code: int) -> None:
        assert command.show(lambda: seen, as_json=True, watch=False) == code

    def test_watching_tells_changes_and_ends_with_the_code_of_the_last(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        worse = topology(tiny(conditions=BAD_CONDITIONS))
        look = Scripted(GOOD, GOOD, UsageError("cannot reach the API server"), GOOD, worse)
        assert command.show(look, as_json=True, watch=True, pause_seconds=0) == 1
        told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [(each["items"][0]["healthy"], each.get("problem")) for each in told] == [
            (True, None),
            (True, "cannot reach the API server"),
            (True, None),
            (False, None),
        ]

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_watching_ends_in_order_when_told_to(self, number: int) -> None:
        looks = 0

        def look() -> list[Topology]:
            nonlocal looks
            looks += 1
            if looks == 2:
                os.kill(os.getpid(), number)
            return [GOOD]

        before = signal.getsignal(number)
        assert command.show(look, as_json=True, watch=True, pause_seconds=0) == 0
        assert (looks, signal.getsignal(number)) == (2, before)

    def test_watching_what_was_never_seen_is_an_error(self) -> None:
        with pytest.raises(UsageError):
            command.show(Scripted(UsageError("nothing runs there")), as_json=False, watch=True, pause_seconds=0)

    def test_a_pipe_gets_no_colours_and_whole_lines(self, capsys: pytest.CaptureFixture[str]) -> None:
        command.show(lambda: [BAD], as_json=False, watch=False)
        out = capsys.readouterr().out
        assert "\x1b" not in out
        assert "donor 0.1 serves place 1.1" in out

    @pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
    def test_a_terminal_gets_colours_unless_told_otherwise(
        self, variables: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        terminal = Terminal()
        monkeypatch.setattr("sys.stdout", terminal)
        command.show(lambda: [BAD], as_json=False, watch=False)
        assert ("\x1b[33m" in terminal.getvalue()) is coloured
        assert "donor 0.1 serves place 1.1" in terminal.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "words", [[], ["status"], ["local"], ["local", "up"], ["bench"], ["chaos"], ["make-tiny-model"]]
)
def test_every_command_helps(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command_line([*words, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(" ".join(["usage: resilientllm", *words]))
    if words in ([], ["status"]):
        assert "exit codes: 0" in text
