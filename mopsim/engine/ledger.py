"""The memory ledger: bytes by category and tier as ops start and end, with the peak's time and cause."""

from mopsim.graph.tape import Step
from mopsim.program.workload import NUM_DEVICE_SLOTS, SLOT, SLOTS, Deltas, Op

GATHERED, GRADS = SLOT["gathered"], SLOT["grads"]


class Ledger:
    """Bytes of one rank. An op's own height is held from its start to its end, then its net change stays.

    high: the highest of each category, whenever it was. by_phase: the highest of the device at the height
    or the end of an op of each phase. rest: the highest of the device without gathered parameters and
    gradients.
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
        self.rest = self.device - self.now[GATHERED] - self.now[GRADS]
        self.host_peak, self.at_host_peak = self.host, list(self.now)
        self.by_phase: dict[str, int] = {}
        self.peak_time = 0.0
        self.peak_op: Op | None = None
        self.over: str | None = self._largest() if self.device > limit else None
        self.curve: list[tuple[float, tuple[int, ...]]] | None = (
            [(0.0, tuple(self.now))] if keep_curve else None
        )
        self._heights: dict[int, tuple[int, int]] = {}
        self._ends: dict[tuple[int, int], tuple[Deltas, int, int]] = {}

    def start(self, op: Op, time: float) -> None:
        """Raise the ledger to the op's height."""
        peak = op.peak
        if not peak:
            return
        now, high = self.now, self.high
        for slot, size in peak:
            size = now[slot] = now[slot] + size
            if size > high[slot]:
                high[slot] = size
        device, host = self._heights.get(id(peak)) or self._height(peak)
        self.device += device
        self.host += host
        rest = self.device - now[GATHERED] - now[GRADS]
        if rest > self.rest:
            self.rest = rest
        if self.device > self.peak:
            self.peak, self.at_peak, self.peak_time, self.peak_op = self.device, list(now), time, op
            if self.over is None and self.device > self.limit:
                grown = [(size, slot) for slot, size in peak if slot < NUM_DEVICE_SLOTS]
                self.over = SLOTS[max(grown)[1]]
        if self.device > self.by_phase.get(op.phase, 0):
            self.by_phase[op.phase] = self.device
        if self.host > self.host_peak:
            self.host_peak, self.at_host_peak = self.host, list(now)
        if self.curve is not None:
            self.curve.append((time, tuple(now)))

    def end(self, op: Op, time: float) -> None:
        """Drop the op's height, keep its net change."""
        peak, net = op.peak, op.net
        if peak or net:
            changes, device, host = self._ends.get((id(peak), id(net))) or self._end(peak, net)
            now = self.now
            for slot, size in changes:
                now[slot] += size
            self.device += device
            self.host += host
            if self.curve is not None:
                self.curve.append((time, tuple(now)))
        if self.device > self.by_phase.get(op.phase, 0):
            self.by_phase[op.phase] = self.device

    def _height(self, peak: Deltas) -> tuple[int, int]:
        """Bytes of the device and of the host, kept for those changes: equal ones are one object."""
        found = self._heights[id(peak)] = _sums(peak)
        return found

    def _end(self, peak: Deltas, net: Deltas) -> tuple[Deltas, int, int]:
        """(The changes at the end of an op; their bytes of the device, of the host), kept likewise."""
        left = dict(net)
        for slot, size in peak:
            left[slot] = left.get(slot, 0) - size
        changes = tuple((slot, size) for slot, size in left.items() if size)
        found = self._ends[id(peak), id(net)] = (changes, *_sums(changes))
        return found

    def _largest(self) -> str:
        return SLOTS[max(range(NUM_DEVICE_SLOTS), key=lambda slot: self.now[slot])]


def _sums(changes: Deltas) -> tuple[int, int]:
    """Bytes of the device, of the host."""
    device = sum(size for slot, size in changes if slot < NUM_DEVICE_SLOTS)
    return device, sum(size for _, size in changes) - device
