"""A table of peaks, of the simulated program against the tracker: of device and host, of what the bytes are
for (each at its own highest, whenever that was), and of phases of the step; every family that runs, on 2
ranks, or on 4 where more than two do something else.

Nothing is fitted.
"""

from collections.abc import Iterable

import pytest

from mopexec.measure.scope import NOW
from mopexec.measure.tracker import MemoryTracker
from mopsim.engine import simulate
from mopsim.spec.plan import Plan
from tests.parity.memory_cases import compared
from tests.parity.tracked import second_step
from tests.sim.toys import machine

WITHIN = 0.02
WHOLE = {"device": 0.01, "host": 0.01}
"""The peak of each tier, and within how much of what is tracked it is predicted."""
PARTS = {
    "weights": ("params",),
    "gathered weights": ("gathered",),
    "gradients": ("grads", "gathered_grads"),
    "optimizer state": ("optimizer", "staging"),
    "activations": ("activations", "boundaries", "dispatch", "logits"),
}
PHASES = {"forward": ("forward",), "backward": ("recompute", "backward"), "optimizer": ("optimizer",)}
ROWS = (*WHOLE, *PARTS, *PHASES)
"""Activations and routed rows are one part: which of the two a tensor is booked on differs between both."""


class Watched(MemoryTracker):
    """Keeps what is highest of each row, since the peak was last reset."""

    def __init__(self, meta: bool) -> None:
        super().__init__(meta=meta)
        self.highest = dict.fromkeys((*PARTS, *PHASES), 0)

    def _book(self, host: bool, name: str, num_bytes: int) -> None:
        super()._book(host, name, num_bytes)
        if not host and num_bytes > 0:
            self._watch()

    def reset_peak(self) -> None:
        super().reset_peak()
        self.highest = dict.fromkeys((*PARTS, *PHASES), 0)

    def _watch(self) -> None:
        now = self._device.by_category
        for row, categories in PARTS.items():
            self.highest[row] = max(self.highest[row], _of(now, categories))
        for row, phases in PHASES.items():
            if NOW.phase in phases:
                self.highest[row] = max(self.highest[row], self._device.bytes)


def _of(found: dict[str, int], names: Iterable[str]) -> int:
    return sum(found.get(name, 0) for name in names)


def tracked(plan: Plan, rank: int = 0) -> dict[str, int]:
    """Bytes by row, of a rank."""
    found = second_step(plan, rank, Watched)
    return found.highest | {"device": found.peak_memory, "host": found.host_memory}


def predicted(plan: Plan) -> dict[str, int]:
    """Bytes by row, of the first stage."""
    result = simulate(
        plan.model, machine(memory=1000, link=1e3), 1, plan.strategy, plan.training, plan.stack, timeline=True
    )
    assert plan.strategy.pipeline.pipeline_parallel == 1
    curves = result.memory_curve_by_category
    rows = {
        row: max(map(sum, zip(*(curves[one] for one in categories if one in curves), strict=True)), default=0)
        for row, categories in PARTS.items()
    }
    rows |= {"device": result.peak_memory, "host": result.host_memory}
    return rows | {
        row: max(result.peak_by_phase.get(one, 0) for one in phases) for row, phases in PHASES.items()
    }


def together(plan: Plan, rows: dict[str, int]) -> dict[str, int]:
    """An update beside a pass has no peak of its own: the two phases are one."""
    beside = {"next_forward": "forward", "backward": "backward"}.get(plan.strategy.optimizer.overlap)
    if beside is None:
        return rows
    return rows | dict.fromkeys((beside, "optimizer"), max(rows[beside], rows["optimizer"]))


TABLES = [(world, name) for world in (2, 4) for name in compared(world)]


@pytest.mark.parametrize(("world", "name"), TABLES)
def test_table(world: int, name: str) -> None:
    """Every row; all that are off are told."""
    plan = compared(world)[name]
    found, known = (together(plan, rows) for rows in (predicted(plan), tracked(plan)))
    assert not {
        row: (found[row], known[row])
        for row in ROWS
        if (known[row] or row in WHOLE)  # else nothing of it is on the device
        and found[row] != pytest.approx(known[row], rel=WHOLE.get(row, WITHIN))
    }
