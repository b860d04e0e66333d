"""Which runs a matrix has, what they mean when they are made again, and what their lines say in a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from random import Random

import pytest
from resilientllm_api.plan import StageId
from resilientllm_cli.chaos import line as lines
from resilientllm_cli.chaos.faults import KINDS
from resilientllm_cli.chaos.leaks import Holding, compare
from resilientllm_cli.chaos.line import Line
from resilientllm_cli.chaos.load import TOKENS, Phase, Undisturbed, asks
from resilientllm_cli.chaos.matrix import SHAPES, cases, soak, worlds
from resilientllm_cli.chaos.run import choose_moment
from resilientllm_cli.chaos.shape import Shape
from resilientllm_cli.errors import UsageError

UNDISTURBED = {phase: Undisturbed({0: [[1]]}, {0: [0.4, 0.2]}) for phase in Phase}


def test_every_kind_has_its_runs_and_every_world_is_made_once() -> None:
    wanted = cases(list(KINDS.values()), SHAPES, runs=20)
    assert set(Counter(case.kind.name for case in wanted).values()) == {20}
    assert len({case.key for case in wanted}) == len(wanted)
    made = [(shape, relayed) for shape, relayed, _ in worlds(wanted)]
    assert len(made) == len(set(made))


def test_a_middle_stage_is_only_killed_where_there_is_one() -> None:
    wanted = cases([KINDS["kill-middle"]], SHAPES, runs=4)
    assert {case.shape.stages for case in wanted} == {3}


def test_a_matrix_that_is_broken_off_has_some_of_each_kind() -> None:
    wanted = cases([KINDS["kill-first"], KINDS["hang"]], [Shape(2, 2)], runs=3)
    assert [case.kind.name for case in wanted[:4]] == ["kill-first", "hang", "kill-first", "hang"]


def test_a_soak_is_one_world_with_the_kinds_mixed_and_the_same_again_for_the_same_seed() -> None:
    wanted = soak(list(KINDS.values()), Shape(2, 3), runs=5)
    assert len(list(worlds(wanted))) == 1
    assert wanted == soak(list(KINDS.values()), Shape(2, 3), runs=5)
    assert wanted != sorted(wanted, key=lambda case: case.seed)
    assert set(Counter(case.kind.name for case in wanted).values()) == {5}


@pytest.mark.parametrize("text", ["2", "0x2", "2x", "ax2"])
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="INSTANCESxSTAGES"):
        Shape.parse(text)


@pytest.mark.parametrize(
    ("shape", "lost", "enough"),
    [
        (Shape(2, 2), ["0.1"], True),
        (Shape(2, 2), ["0.1", "1.1"], False),
        (Shape(2, 2), ["0.1", "1.0"], True),
        (Shape(2, 2), ["0.0", "0.1"], True),
        (Shape(3, 2), ["0.1", "1.1"], False),  # the third takes one guest
        (Shape(3, 3), ["0.0", "1.1", "2.2"], True),
        (Shape(4, 1), ["0.0", "3.0"], True),
        (Shape(4, 1), ["0.0", "1.0", "3.0"], False),
        (Shape(1, 2), ["0.0"], False),
    ],
)
def test_each_lost_stage_needs_a_donor_of_its_own_place_that_is_there(
    shape: Shape, lost: list[str], enough: bool
) -> None:
    assert shape.have_donors({StageId.parse(each) for each in lost}) is enough


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_copies_of_a_stage_are_on_different_nodes(shape: Shape) -> None:
    for stage in range(shape.stages):
        nodes = {shape.node_of(StageId(instance=instance, stage=stage)) for instance in range(shape.instances)}
        assert len(nodes) == shape.instances


def test_the_same_seed_chooses_the_same_moment() -> None:
    moments = [choose_moment(Random("kill 2x2 7"), UNDISTURBED, 0) for _ in range(2)]
    assert moments[0] == moments[1]


def test_moments_are_in_prefill_and_in_decode_and_while_there_is_something_left() -> None:
    moments = [choose_moment(Random(seed), UNDISTURBED, 0) for seed in range(100)]
    assert {moment.phase for moment in moments} == set(Phase)
    assert all(0 < moment.tokens < TOKENS[moment.phase] for moment in moments)
    assert all(moment.delay_seconds <= 0.4 for moment in moments)


def test_no_two_streams_of_a_run_have_the_same_prompt() -> None:
    prompts = [ask.prompt for instance in range(3) for ask in asks(instance, Phase.DECODE)]
    assert len(set(prompts)) == len(prompts)


def test_a_table_has_a_row_for_each_kind() -> None:
    runs = [
        Line("hang", "2x2", 1, {"pid": 1}, stalls_seconds=(0.1, 0.3), detection_seconds=0.2),
        Line("hang", "2x2", 2, {}, lost=3, problems=("lost: 3",)),
    ]
    *_, row = lines.table([asdict(run) for run in runs]).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["hang", "2", "1", "0.200", "0.100", "0.300", "3", "0", "0", "0", "0", "1"]


def test_lines_survive_their_file() -> None:
    line = Line("hang", "2x2", 1, {"pid": 1}, stalls_seconds=(0.1,))
    (read,) = lines.read(line.to_json() + "\n")
    assert Line(**{**read, "stalls_seconds": tuple(read["stalls_seconds"]), "recoveries": (), "problems": ()}) == line


def holding(descriptors: dict[int, int], connections: int = 10, kv_in_use: float = 0.0) -> Holding:
    return Holding(len(descriptors), descriptors, dict.fromkeys(descriptors, 1 << 20), connections, 2, kv_in_use)


def test_only_processes_that_lived_on_can_leak_descriptors() -> None:
    leaks = compare(holding({1: 20, 2: 20}), holding({1: 20, 3: 90}))
    assert leaks.problems() == []


def test_what_grew_is_a_leak() -> None:
    leaks = compare(holding({1: 20, 2: 20}), holding({1: 20, 2: 30, 3: 1}, connections=40, kv_in_use=0.1))
    named = {problem.split(":")[0] for problem in leaks.problems()}
    assert named == {"leaks processes", "leaks descriptors", "leaks connections", "leaks kv_in_use"}
