"""Which runs there are, and in which order: pure. A world is made once for all runs of its shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from random import Random

from resilientllm_cli.chaos.scene import Kind
from resilientllm_cli.chaos.shape import Shape

SHAPES = (Shape(2, 2), Shape(3, 2), Shape(2, 3), Shape(3, 3))


@dataclass(frozen=True)
class Case:
    kind: Kind
    shape: Shape
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.kind.name, str(self.shape), self.seed


def cases(kinds: Sequence[Kind], shapes: Sequence[Shape], runs: int, first_seed: int = 1) -> list[Case]:
    """``runs`` of each kind, spread over the shapes that it can happen in. Seeds go round the kinds, so that a matrix
    which is broken off has some of each."""
    found = []
    for kind in kinds:
        fitting = [shape for shape in shapes if kind.relayed or kind.places(shape)]
        for number in range(runs if fitting else 0):
            found.append(Case(kind, fitting[number % len(fitting)], first_seed + number))
    return sorted(found, key=lambda case: (shapes.index(case.shape), case.kind.relayed, case.seed))


def soak(kinds: Sequence[Kind], shape: Shape, runs: int, first_seed: int = 1) -> list[Case]:
    """The same in one world, kinds at random. Those that need a relay are left out: it would be in the path of all."""
    wanted = cases([kind for kind in kinds if not kind.relayed], [shape], runs, first_seed)
    Random(f"soak {shape} {first_seed}").shuffle(wanted)
    return wanted


def worlds(wanted: Iterable[Case]) -> Iterator[tuple[Shape, bool, list[Case]]]:
    """Shape, whether with a relay, and the runs there."""
    for (shape, relayed), group in groupby(wanted, key=lambda case: (case.shape, case.kind.relayed)):
        yield shape, relayed, list(group)
