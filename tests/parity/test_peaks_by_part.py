"""A table of peaks, of the simulated program against the tracker: of what the bytes are for (each at its own
highest, whenever that was), and of phases of the step; every family that runs, on 2 and on 4 ranks.

Nothing is fitted. A cell that is further off than `WITHIN` is in MISSES with its cause, and has to miss.
"""

from collections.abc import Iterable
from functools import cache

import pytest

from mopexec.measure.scope import NOW
from mopexec.measure.tracker import MemoryTracker
from mopsim.engine import simulate
from mopsim.spec.plan import Plan
from tests.parity.memory_cases import cases
from tests.parity.tracked import second_step
from tests.sim.toys import machine

WITHIN = 0.02
PARTS = {
    "weights": ("params",),
    "gathered weights": ("gathered",),
    "gradients": ("grads", "gathered_grads"),
    "optimizer state": ("optimizer", "staging"),
    "activations": ("activations", "boundaries", "dispatch", "logits"),
}
PHASES = {"forward": ("forward",), "backward": ("recompute", "backward"), "optimizer": ("optimizer",)}
ROWS = (*PARTS, *PHASES)
"""Activations and routed rows are one part: which of the two a tensor is booked on differs between both."""


class Watched(MemoryTracker):
    """Keeps what is highest of each row, since the peak was last reset."""

    def __init__(self, meta: bool) -> None:
        super().__init__(meta=meta)
        self.highest = dict.fromkeys(ROWS, 0)

    def _book(self, host: bool, name: str, num_bytes: int) -> None:
        super()._book(host, name, num_bytes)
        if not host and num_bytes > 0:
            self._watch()

    def reset_peak(self) -> None:
        super().reset_peak()
        self.highest = dict.fromkeys(ROWS, 0)

    def _watch(self) -> None:
        now = self._device.by_category
        for row, categories in PARTS.items():
            self.highest[row] = max(self.highest[row], _of(now, categories))
        for row, phases in PHASES.items():
            if NOW.phase in phases:
                self.highest[row] = max(self.highest[row], self._device.bytes)


def _of(found: dict[str, int], names: Iterable[str]) -> int:
    return sum(found.get(name, 0) for name in names)


def predicted(plan: Plan) -> dict[str, int]:
    """Bytes by row, of the first stage."""
    result = simulate(
        plan.model, machine(memory=1000), 1, plan.strategy, plan.training, plan.stack, timeline=True
    )
    assert plan.strategy.pipeline.pipeline_parallel == 1
    curves = result.memory_curve_by_category
    rows = {
        row: max(map(sum, zip(*(curves[one] for one in categories if one in curves), strict=True)), default=0)
        for row, categories in PARTS.items()
    }
    return rows | {
        row: max(result.peak_by_phase.get(one, 0) for one in phases) for row, phases in PHASES.items()
    }


BESIDE = "the update runs beside the next forward: its phase's peak is the forward's"
COPIES = "a copy to the host takes its time beside compute; that of a dry run is over at once"
UNKNOWN = "not explained: 4 to 9 % low at its own highest, where the device's peak is not"
MISSES = {
    (2, "mop_replicas", "optimizer"): BESIDE,
    (4, "mop_replicas", "optimizer"): BESIDE,
    (2, "fsdp2_boundaries", "forward"): COPIES,
    (4, "fsdp2_boundaries", "forward"): COPIES,
    (2, "fsdp2_offload", "forward"): COPIES,
    (4, "fsdp2_offload", "forward"): COPIES,
    (2, "fsdp2_offload", "gathered weights"): UNKNOWN,
    (2, "fsdp2_offload", "gradients"): UNKNOWN,
    (2, "fsdp2_keep", "gradients"): UNKNOWN,
}
"""By ranks, plan and row: why the cell is further off."""


@cache
def table(world: int, name: str) -> dict[str, tuple[int, int]]:
    """(predicted, tracked) bytes by row."""
    plan = cases(world)[name]
    tracked, found = second_step(plan, 0, Watched), predicted(plan)
    return {row: (found[row], tracked.highest[row]) for row in ROWS}


def _cells() -> list[object]:
    found = []
    for world in (2, 4):
        for name in cases(world):
            for row in ROWS:
                cause = MISSES.get((world, name, row))
                marks = [pytest.mark.xfail(reason=cause, strict=True)] if cause else []
                found.append(pytest.param(world, name, row, marks=marks, id=f"{name}-{world}-{row}"))
    return found


@pytest.mark.parametrize(("world", "name", "row"), _cells())
def test_cell(world: int, name: str, row: str) -> None:
    predicted, tracked = table(world, name)[row]
    if tracked:  # else nothing of it is on the device
        assert predicted == pytest.approx(tracked, rel=WITHIN)
