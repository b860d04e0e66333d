"""How many instances, of how many stages, and which of them share a node. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Self

from resilientllm_api.plan import StageId

from resilientllm_cli.errors import UsageError


@dataclass(frozen=True)
class Shape:
    instances: int
    stages: int

    def __str__(self) -> str:
        return f"{self.instances}x{self.stages}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """``2x3``: two instances of three stages."""
        instances, cross, stages = text.partition("x")
        if not (cross and instances.isdecimal() and stages.isdecimal() and int(instances) > 0 and int(stages) > 0):
            raise UsageError(f"a shape is INSTANCESxSTAGES, such as 2x3, found {text!r}")
        return cls(int(instances), int(stages))

    def stage_ids(self) -> Iterator[StageId]:
        for instance in range(self.instances):
            for stage in range(self.stages):
                yield StageId(instance=instance, stage=stage)

    def have_donors(self, lost: Set[StageId]) -> bool:
        """Whether each of the lost stages can have a donor of its own: one of the same place, which takes one guest."""
        at_place = Counter(stage.stage for stage in lost)
        return all(count <= self.instances - count for count in at_place.values())

    def node_of(self, stage: StageId) -> int:
        """As many nodes as instances, with an engine each; copies of a stage are on different ones."""
        return (stage.instance + stage.stage) % self.instances
