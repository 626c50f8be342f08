"""SimResult: what one simulated step costs in time and memory. SI units."""

from dataclasses import dataclass, field
from typing import Any

from mopsim.common.io import to_plain
from mopsim.engine.record import Span
from mopsim.spec.stack import Stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec


@dataclass(frozen=True)
class SimResult:
    """One optimizer step. Memory is of the fullest rank, bytes; `resident_memory` of it lives through the
    step. time_by_component sums to the step; `runtime` is what calibration adds between the ops. Spans are of
    the stage that ends last, the memory curves of the fullest. highest_by_category: each category at its own
    highest, whenever that was. peak_by_stage: peak memory of each pipeline stage's ranks.

    exposed: seconds in which compute waits, or which a collective beside it takes from it, by what for: kinds
    of `busy`, none for longer than it is busy; `host`, kernels issued late; `peers`, other stages of a
    pipeline that had not come so far.

    above_peak, above_host: bytes that may come on top of the peak and of host_memory, by cause
    (mopsim.engine.upper). verdict: `fits` where the upper bounds are within the limits, `at risk` where only
    the points are, `out of memory` where a point is not; `fits` is false there alone. at_risk: what is."""

    step_time: float
    tokens_per_second: float
    tokens_per_second_per_device: float
    model_flops_per_second_per_device: float
    mfu: float
    fits: bool
    over: str | None
    over_bytes: int
    peak_memory: int
    memory_limit: int
    memory_by_category: dict[str, int]
    highest_by_category: dict[str, int]
    peak_by_stage: tuple[int, ...]
    peak_time: float
    peak_component: str
    peak_phase: str
    resident_memory: int
    host_memory: int
    host_limit: int
    host_by_category: dict[str, int]
    above_peak: dict[str, int]
    above_host: dict[str, int]
    guarantee_memory: int
    exposed: dict[str, float]
    busy: dict[str, float]
    time_by_component: dict[str, float]
    num_ops: dict[str, int]
    flops: float
    strategy: Strategy
    training: TrainSpec
    stack: Stack
    provenance: dict[str, str]
    num_events: int = 0
    span_stage: int = 0
    memory_stage: int = 0
    spans: list[Span] = field(default_factory=list)
    memory_curve: list[tuple[float, int]] = field(default_factory=list)
    memory_curve_by_category: dict[str, list[int]] = field(default_factory=dict)

    @property
    def peak_upper(self) -> int:
        """Bytes that the fullest rank's device holds at most."""
        return self.peak_memory + sum(self.above_peak.values())

    @property
    def host_upper(self) -> int:
        """Bytes that a rank takes of its host at most."""
        return self.host_memory + sum(self.above_host.values())

    @property
    def verdict(self) -> str:
        if not self.fits:
            return "out of memory"
        return "at risk" if self.at_risk else "fits"

    @property
    def at_risk(self) -> tuple[str, ...]:
        """Which upper bounds are beyond their limit: device, host."""
        beyond = {
            "device": self.peak_upper > self.memory_limit,
            "host": self.host_upper > self.host_limit,
        }
        return tuple(name for name, over in beyond.items() if over)

    def to_json(self) -> dict[str, Any]:
        """The keys of `mopsim simulate --json`: seconds, bytes, FLOP/s."""
        return {
            "step_time_s": self.step_time,
            "tokens_per_s": self.tokens_per_second,
            "tokens_per_s_per_device": self.tokens_per_second_per_device,
            "model_flops_per_s_per_device": self.model_flops_per_second_per_device,
            "mfu": self.mfu,
            "fits": self.fits,
            "verdict": self.verdict,
            "over": self.over,
            "over_bytes": self.over_bytes,
            "peak_memory_bytes": self.peak_memory,
            "peak_memory_upper_bytes": self.peak_upper,
            "above_peak_bytes": self.above_peak,
            "memory_limit_bytes": self.memory_limit,
            "memory_by_category_bytes": self.memory_by_category,
            "peak_at": {"time_s": self.peak_time, "component": self.peak_component, "phase": self.peak_phase},
            "resident_memory_bytes": self.resident_memory,
            "host_memory_bytes": self.host_memory,
            "host_memory_upper_bytes": self.host_upper,
            "above_host_bytes": self.above_host,
            "host_limit_bytes": self.host_limit,
            "host_by_category_bytes": self.host_by_category,
            "guarantee_memory_bytes": self.guarantee_memory,
            "exposed_s": self.exposed,
            "busy_s": self.busy,
            "time_by_component_s": self.time_by_component,
            "strategy": to_plain(self.strategy),
            "training": to_plain(self.training),
            "stack": self.stack.name,
            "provenance": self.provenance,
        }
