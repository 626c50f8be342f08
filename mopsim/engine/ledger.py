"""The memory ledger: bytes by category and tier as ops start and end, with the peak's time and cause."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mopsim.common.errors import MopError
from mopsim.graph.tape import Step
from mopsim.program.workload import NUM_DEVICE_SLOTS, SLOT, SLOTS, Op

GATHERED, GRADS = SLOT["gathered"], SLOT["grads"]
Counts = NDArray[np.int64]
MOST = 2**57
"""Bytes of a category, so that 64 bits hold the sum of all."""


class Ledger:
    """Bytes of one rank. An op's own height is held from its start to its end, then its net change stays.

    high: the highest of each category, whenever it was. by_phase: the highest of the device at the height
    or the end of an op of each phase. rest: the highest of the device without gathered parameters and
    gradients.
    """

    def __init__(self, resident: tuple[Step, ...], keep_curve: bool) -> None:
        self.now: list[int] = [0] * len(SLOTS)
        for category, size in resident:
            self.now[SLOT[category]] += size
        self.resident = list(self.now)
        self.high = list(self.now)
        self.peak, self.at_peak = sum(self.now[:NUM_DEVICE_SLOTS]), list(self.now)
        self.rest = self.peak - self.now[GATHERED] - self.now[GRADS]
        self.host_peak, self.at_host_peak = sum(self.now[NUM_DEVICE_SLOTS:]), list(self.now)
        self.by_phase: dict[str, int] = {}
        self.peak_time = 0.0
        self.peak_op: Op | None = None
        self.curve: list[tuple[float, tuple[int, ...]]] | None = (
            [(0.0, tuple(self.now))] if keep_curve else None
        )

    def play(
        self, ops: Sequence[Op], moves: Sequence[int], starts: Sequence[float], ends: Sequence[float]
    ) -> None:
        """Ops start and end. moves: indices in their order, inverted where an op ends; one that has no height
        need not start. starts, ends: seconds of every op."""
        places = np.array(moves, dtype=np.int64)
        begins = places >= 0
        places = np.where(begins, places, ~places)
        kinds, changes, touched = _changes(ops)
        used = np.flatnonzero(changes.any(axis=0))
        rows = np.where(begins, 2 * kinds[places], 2 * kinds[places] + 1)
        if int(np.abs(changes).max(initial=0)) * len(rows) > MOST:
            _require_counted(np.abs(np.cumsum(changes[rows], axis=0, dtype=np.float64)).max())
        now = np.array(self.now)[used] + np.cumsum(changes[:, used][rows], axis=0)
        held = _Held(used, self.now, now)
        high = np.asarray(touched.any(axis=1))[rows]
        if high.any():
            above = _Held(used, self.now, now[high])
            self._heights([ops[place] for place in places[high].tolist()], above, starts)
            grown = np.where(touched[:, used][rows[high]], above.now, 0).max(axis=0)
            for slot, size in zip(used.tolist(), grown.tolist(), strict=True):
                self.high[slot] = max(self.high[slot], size)
        own = np.array([op.stream == "compute" or bool(op.net) for op in ops], dtype=np.bool_)[places]
        shown = high | (~begins & own)  # what ends beside the compute may end in a later phase of it
        self._by_phase(ops, places[shown], held.device[shown])
        if self.curve is not None:
            for row, (move, place) in enumerate(zip(moves, places.tolist(), strict=True)):
                op = ops[place]
                if op.peak or (move < 0 and op.net):
                    self.curve.append((starts[place] if move >= 0 else ends[place], tuple(held.at(row))))
        if len(now):
            self.now = held.at(-1)

    def _heights(self, ops: Sequence[Op], held: "_Held", starts: Sequence[float]) -> None:
        """The ledger as ops are at their height."""
        device, host = held.device, held.host
        most = int(np.argmax(device))
        if device[most] > self.peak:
            self.peak, self.at_peak = int(device[most]), held.at(most)
            self.peak_time, self.peak_op = starts[ops[most].index], ops[most]
        self.rest = max(self.rest, int((device - held.of(GATHERED) - held.of(GRADS)).max()))
        most = int(np.argmax(host))
        if host[most] > self.host_peak:
            self.host_peak, self.at_host_peak = int(host[most]), held.at(most)

    def _by_phase(self, ops: Sequence[Op], places: Counts, device: Counts) -> None:
        """The highest of the device by phase, in the order in which they begin."""
        names: dict[str, int] = {}
        phases = np.array([names.setdefault(op.phase, len(names)) for op in ops], dtype=np.int64)[places]
        most, first = np.zeros(len(names), dtype=np.int64), np.full(len(names), len(places))
        np.maximum.at(most, phases, device)
        np.minimum.at(first, phases, np.where(device > 0, np.arange(len(places)), len(places)))
        every = list(names)
        self.by_phase = {every[at]: int(most[at]) for at in np.argsort(first).tolist() if most[at] > 0}


@dataclass(frozen=True)
class _Held:
    """Bytes after each of some moves. now: of the slots that are used; given: of all, before."""

    used: Counts
    given: Sequence[int]
    now: Counts

    @property
    def device(self) -> Counts:
        return self._of(self.used < NUM_DEVICE_SLOTS, self.given[:NUM_DEVICE_SLOTS])

    @property
    def host(self) -> Counts:
        return self._of(self.used >= NUM_DEVICE_SLOTS, self.given[NUM_DEVICE_SLOTS:])

    def _of(self, mine: NDArray[np.bool_], given: Sequence[int]) -> Counts:
        rest = sum(given) - sum(self.given[slot] for slot in self.used[mine].tolist())
        return np.asarray(self.now[:, mine].sum(axis=1) + rest)

    def of(self, slot: int) -> Counts | int:
        """Of one slot."""
        mine = np.flatnonzero(self.used == slot)
        return self.now[:, mine[0]] if len(mine) else self.given[slot]

    def at(self, row: int) -> list[int]:
        """Of all slots, after one move."""
        found = list(self.given)
        for slot, size in zip(self.used.tolist(), self.now[row].tolist(), strict=True):
            found[slot] = size
        return found


def _require_counted(size: float) -> None:
    """Raise MopError where a rank would hold more than can be counted."""
    if size > MOST:
        rule = "has a rank hold more than 2^57 bytes of one category: fewer tokens are simulated"
        raise MopError(f"training.seq_len: {rule}")


def _changes(ops: Sequence[Op]) -> tuple[Counts, Counts, NDArray[np.bool_]]:
    """(The kind of change of each op; bytes by slot of each kind, as an op starts and, in the next row, as it
    ends; which slots change at these starts). Equal changes are one object."""
    known: dict[tuple[int, int], int] = {}
    firsts: list[Op] = []
    kinds = []
    for op in ops:
        key = id(op.peak), id(op.net)
        kind = known.get(key)
        if kind is None:
            kind = known[key] = len(firsts)
            firsts.append(op)
        kinds.append(kind)
    _require_counted(max((abs(size) for op in firsts for _, size in (*op.peak, *op.net)), default=0))
    changes = np.zeros((2 * len(firsts), len(SLOTS)), dtype=np.int64)
    touched = np.zeros(changes.shape, dtype=np.bool_)
    for kind, op in enumerate(firsts):
        for slot, size in op.peak:
            changes[2 * kind, slot], changes[2 * kind + 1, slot] = size, -size
            touched[2 * kind, slot] = True
        for slot, size in op.net:
            changes[2 * kind + 1, slot] += size
    return np.array(kinds, dtype=np.int64), changes, touched
