"""The memory ledger: bytes by category and tier as ops start and end, with the peak's time and cause."""

from mopsim.graph.tape import Step
from mopsim.program.workload import NUM_DEVICE_SLOTS, SLOT, SLOTS, Deltas, Op


class Ledger:
    """Bytes of one rank. An op's own height is held from its start to its end, then its net change stays.

    high: the highest of each category, whenever it was. by_phase: the highest of the device at the height
    or the end of an op of each phase.
    """

    def __init__(self, resident: tuple[Step, ...], limit: int, keep_curve: bool) -> None:
        self.now: list[int] = [0] * len(SLOTS)
        for category, size in resident:
            self.now[SLOT[category]] += size
        self.resident = list(self.now)
        self.high = list(self.now)
        self.device = sum(self.now[:NUM_DEVICE_SLOTS])
        self.host = sum(self.now[NUM_DEVICE_SLOTS:])
        self.limit = limit
        self.peak, self.at_peak = self.device, list(self.now)
        self.host_peak, self.at_host_peak = self.host, list(self.now)
        self.by_phase: dict[str, int] = {}
        self.peak_time = 0.0
        self.peak_op: Op | None = None
        self.over: str | None = self._largest() if self.device > limit else None
        self.curve: list[tuple[float, tuple[int, ...]]] | None = (
            [(0.0, tuple(self.now))] if keep_curve else None
        )
        self._sums: dict[int, tuple[Deltas, int, int]] = {}

    def start(self, op: Op, time: float) -> None:
        """Raise the ledger to the op's height."""
        if not op.peak:
            return
        now, high = self.now, self.high
        for slot, size in op.peak:
            now[slot] += size
            if now[slot] > high[slot]:
                high[slot] = now[slot]
        _, device, host = self._sums.get(id(op.peak)) or self._sum(op.peak)
        self.device += device
        self.host += host
        if self.device > self.peak:
            self.peak, self.at_peak, self.peak_time, self.peak_op = self.device, list(now), time, op
            if self.over is None and self.device > self.limit:
                grown = [(size, slot) for slot, size in op.peak if slot < NUM_DEVICE_SLOTS]
                self.over = SLOTS[max(grown)[1]]
        self._highest(op.phase)
        if self.host > self.host_peak:
            self.host_peak, self.at_host_peak = self.host, list(now)
        if self.curve is not None:
            self.curve.append((time, tuple(now)))

    def end(self, op: Op, time: float) -> None:
        """Drop the op's height, keep its net change."""
        if not op.peak and not op.net:
            self._highest(op.phase)
            return
        now = self.now
        for slot, size in op.peak:
            now[slot] -= size
        for slot, size in op.net:
            now[slot] += size
        _, held, held_host = self._sums.get(id(op.peak)) or self._sum(op.peak)
        _, kept, kept_host = self._sums.get(id(op.net)) or self._sum(op.net)
        self.device += kept - held
        self.host += kept_host - held_host
        self._highest(op.phase)
        if self.curve is not None:
            self.curve.append((time, tuple(now)))

    def _highest(self, phase: str) -> None:
        if self.device > self.by_phase.get(phase, 0):
            self.by_phase[phase] = self.device

    def _sum(self, changes: Deltas) -> tuple[Deltas, int, int]:
        """(The changes, which keeps their id; their bytes of the device, of the host), kept by it."""
        device = sum(size for slot, size in changes if slot < NUM_DEVICE_SLOTS)
        found = (changes, device, sum(size for _, size in changes) - device)
        self._sums[id(changes)] = found
        return found

    def _largest(self) -> str:
        return SLOTS[max(range(NUM_DEVICE_SLOTS), key=lambda slot: self.now[slot])]
