"""The candidates of a family as columns of a table: hundreds of thousands cost milliseconds, none is
built before it is needed."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mopsim.cost.stack import as_used, waiting
from mopsim.search.build import build
from mopsim.search.problem import Column, Problem, tokens
from mopsim.search.stages import IDEAL
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.stack import Stack
from mopsim.spec.strategy import Strategy

IN_8_BITS = ("fsdp2", "megatron")
"""Families whose products may be cast (CAST)."""

Columns = dict[str, Column]


@dataclass(frozen=True)
class Space:
    """Candidates of one family: equal columns of integers, one row per candidate; `build(row)` makes the
    Strategy."""

    family: str
    problem: Problem
    columns: Columns
    rejected: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.columns["micro_batch"])

    def part(self, start: int, stop: int) -> "Space":
        """Rows start to stop, as views."""
        columns = {name: column[start:stop] for name, column in self.columns.items()}
        return Space(self.family, self.problem, columns)

    def take(self, rows: Column) -> "Space":
        """The rows of these places, in their order."""
        return Space(self.family, self.problem, taken(self.columns, rows))

    def having(self, **values: int) -> "Space":
        """The same rows with other values in some columns."""
        same = {name: np.broadcast_to(np.int64(value), len(self)) for name, value in values.items()}
        return Space(self.family, self.problem, {**self.columns, **same})

    def row(self, index: int) -> dict[str, int]:
        return {name: int(column[index]) for name, column in self.columns.items()}

    def build(self, index: int) -> Strategy:
        """The Strategy of one row. Raises SpecError where a relation that the columns do not hold breaks."""
        return build(self.family, self.problem, self.row(index))

    @cached_property
    def stack(self) -> Stack:
        """The software that the candidates run on."""
        return self.problem.software(self.family).under(int(self.columns["zero"].min(initial=3)))

    @cached_property
    def machine(self) -> HardwareProfile:
        """The hardware as that software uses it, in a step that waits for the slowest device."""
        problem = self.problem
        used = as_used(problem.hardware, self.stack, problem.model, problem.training)
        return waiting(used, problem.world_size)

    def tokens(self) -> Column:
        """N of every row: tokens per rank and microbatch."""
        return tokens(self.problem, self.columns)

    def microbatches(self) -> NDArray[np.float64]:
        """Of a step of every row."""
        c, asked = self.columns, self.problem
        groups = asked.world_size / (c["pipeline"] * c["tensor"] * c["sequence"])
        return np.asarray(asked.training.global_batch / (c["micro_batch"] * groups))

    def within(self) -> tuple[Column, Column, Column]:
        """What decides beside columns of their own what the parts of every row are: (whether a step has one
        microbatch alone, whose gradients are added to none; whether its program weaves; whether no other rank
        sums its gradients, for whose buckets a compiler may cut its graphs: Stack.cut)."""
        c = self.columns
        woven = (c["overlap"] == 1) & (c["layout"] != IDEAL) & (c["zero"] < 2)
        alone = (c["pipeline"] * c["tensor"] == self.problem.world_size) & self.stack.sharding.bucketed
        one = self.microbatches() == 1
        return one.astype(np.int64), woven.astype(np.int64), alone.astype(np.int64)


def taken(columns: Columns, rows: Column) -> Columns:
    """The rows of these places; a column of one value stays one."""
    return {
        name: column.take(rows) if column.strides[0] else np.broadcast_to(column[:1], len(rows))
        for name, column in columns.items()
    }
