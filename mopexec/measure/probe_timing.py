"""Timing that a busy neighbour does not spoil: interleaved repeats, low quantiles."""

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

K = TypeVar("K", bound=Hashable)
LOW_QUANTILE = 0.1
"""The fastest decile stands for the machine by itself; the rest is neighbours and the scheduler."""


@dataclass(frozen=True)
class Sample:
    """Seconds of one call: the low quantile over repeats, 90th percentile / low (1 = no noise), how many."""

    seconds: float
    spread: float
    repeats: int


class Stopwatch:
    """Seconds per call on one device: CUDA events on a GPU, a clock on a CPU.

    clock: `time.thread_time` counts only what this thread runs, so a busy neighbour does not count;
    `time.perf_counter` where other threads or ranks share the work.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.thread_time) -> None:
        self.device = device
        self.clock = clock
        self.target = 1e-3 if device.type == "cuda" else 2e-4

    def time(self, call: Callable[[], object], calls: int) -> float:
        """Mean seconds of `calls` consecutive calls."""
        if self.device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            for _ in range(calls):
                call()
            stop.record()
            stop.synchronize()
            return float(start.elapsed_time(stop)) * 1e-3 / calls
        begin = self.clock()
        for _ in range(calls):
            call()
        return (self.clock() - begin) / calls

    def calls_for(self, call: Callable[[], object]) -> int:
        """Calls per timing so that the clock's own cost does not count; warms the call up."""
        self.time(call, 1)
        once = max(self.time(call, 1), 1e-7)
        return int(min(max(self.target / once, 1), 200))


def summarize(seconds: list[float], quantile: float = LOW_QUANTILE) -> Sample:
    """The Sample of a list of repeats."""
    low, high = np.quantile(seconds, [quantile, 0.9])
    low = max(float(low), 1e-9)
    return Sample(low, float(high) / low, len(seconds))


def measure(
    cases: Mapping[K, Callable[[], object]], stopwatch: Stopwatch, budget: float, min_rounds: int = 4
) -> dict[K, Sample]:
    """Time every case, one after the other, round after round, until `budget` seconds have passed.

    A disturbance of some milliseconds then hits one round of a few cases, not all repeats of one.
    """
    calls = {key: stopwatch.calls_for(call) for key, call in cases.items()}
    seconds: dict[K, list[float]] = {key: [] for key in cases}
    end, rounds = time.perf_counter() + budget, 0
    while rounds < min_rounds or (time.perf_counter() < end and rounds < 100):
        for key, call in cases.items():
            seconds[key].append(stopwatch.time(call, calls[key]))
        rounds += 1
    return {key: summarize(values) for key, values in seconds.items()}
