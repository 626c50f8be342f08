"""SimResult: what one simulated step costs in time and memory. SI units."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from mopsim.common.io import to_plain
from mopsim.common.units import format_bytes, format_probability
from mopsim.engine.record import Span
from mopsim.intervals.memory import PeakSpread
from mopsim.intervals.spread import (
    SURE,
    Facts,
    Ratio,
    Spread,
    against,
    fitting_in_words,
    of_peak_memory,
    of_step_time,
    ratio,
)
from mopsim.spec.categories import shown_as, spoken
from mopsim.spec.line import describe
from mopsim.spec.stack import Stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec

UPPER = 0.95
"""Probability with which the bytes of the `_upper` keys are enough."""
HOPELESS = 0.01
"""P(fits) below which the user's own runs say that a step is out of memory: what is printed as <0.01."""


@dataclass(frozen=True)
class SimResult:
    """One optimizer step. Memory is of the fullest rank, bytes; `resident_memory` of it lives through the
    step. time_by_component sums to the step: what the compute stream's ops take, `waiting` while it stands
    still, `runtime` that calibration adds between the ops. Spans are of
    the stage that ends last, the memory curves of the fullest. highest_by_category: each category at its own
    highest, whenever that was; peak_by_phase: the highest at the height or the end of an op of each phase.
    peak_by_stage: peak memory of each pipeline stage's ranks. reserved_memory: what torch's caching allocator
    has for the peak and for what was cached before it in pools of other streams. set_aside: of the device's
    memory, beside memory_limit, for the driver and the framework, or beside the stack's pool.

    exposed: seconds in which compute waits, or which a collective beside it takes from it, by what for: kinds
    of `busy`, none for longer than it is busy; `host`, kernels issued late; `peers`, other stages of a
    pipeline that had not come so far.

    above_peak, above_host: bytes that may come on top of the peak and of host_memory, by cause
    (mopsim.engine.upper). fits: whether the points are within the limits, and the
    user's own runs do not say that it is `hopeless`; over: the category that takes most at the peak where
    the device is too small, `host` where the host is, None where it fits; p_fits: the probability that what
    will be measured is, of errors like those of published runs (mopsim.intervals). facts: what they are
    grouped by. each: what a device is called: a rank where devices are CPUs. routed: whether the network
    has experts."""

    step_time: float
    tokens_per_second: float
    tokens_per_second_per_device: float
    model_flops_per_second_per_device: float
    mfu: float
    fits: bool
    over: str | None
    peak_memory: int
    reserved_memory: int
    memory_limit: int
    memory_by_category: dict[str, int]
    highest_by_category: dict[str, int]
    peak_by_phase: dict[str, int]
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
    facts: Facts
    each: Literal["GPU", "rank"] = "GPU"
    routed: bool = True
    num_events: int = 0
    set_aside: int = 0
    span_stage: int = 0
    memory_stage: int = 0
    spans: list[Span] = field(default_factory=list)
    memory_curve: list[tuple[float, int]] = field(default_factory=list)
    memory_curve_by_category: dict[str, list[int]] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """Its strategy in a line."""
        return describe(self.strategy, self.routed)

    @property
    def speed(self) -> str:
        """'1,234 tokens/s per GPU'."""
        return f"{self.tokens_per_second_per_device:,.0f} tokens/s per {self.each}"

    @cached_property
    def device(self) -> PeakSpread:
        """What the fullest rank's device will hold."""
        return PeakSpread(self.peak_memory, sum(self.above_peak.values()), of_peak_memory(self.facts))

    @cached_property
    def host(self) -> PeakSpread:
        """What a rank will take of its host: its tensors are counted."""
        return PeakSpread(self.host_memory, sum(self.above_host.values()), Spread(0.0, 0.0))

    @cached_property
    def p_device(self) -> float:
        """Probability that the device's memory is enough."""
        return self.device.below(self.memory_limit)

    @property
    def missing_bytes(self) -> tuple[int, int]:
        """What tensors of a rank have too little room for, on the device and on the host; where the user's
        own runs say so, what is as likely needed as not has."""
        device, host = self.peak_memory, self.host_memory
        if self.hopeless:
            device = max(device, round(self.device.quantile(0.5)))
            host = max(host, round(self.host.quantile(0.5)))
        return max(0, device - self.memory_limit), max(0, host - self.host_limit)

    @cached_property
    def hopeless(self) -> bool:
        """Whether by the user's own runs it hardly fits, whatever is simulated."""
        return self.corrected_peak_memory is not None and self.p_fits < HOPELESS

    @property
    def over_bytes(self) -> int:
        """Of the device, or where that is enough of the host."""
        device, host = self.missing_bytes
        return device or host

    @property
    def excess(self) -> str:
        """'gradients are 187.55 GiB over': by what it does not fit."""
        return f"{spoken(self.over or '')} {format_bytes(self.over_bytes)} over"

    @property
    def enough(self) -> str:
        """'2% more device memory and 8% more host memory would do'."""
        limits = zip(
            ("device", "host"), self.missing_bytes, (self.memory_limit, self.host_limit), strict=True
        )
        more = (f"{size / max(limit, 1):.0%} more {where} memory" for where, size, limit in limits if size)
        return f"{' and '.join(more)} would do"

    @property
    def missing(self) -> str:
        """'2 GiB over on the device and 8 GiB over on the host'."""
        tiers = zip(("device", "host"), self.missing_bytes, strict=True)
        return " and ".join(f"{format_bytes(size)} over on the {where}" for where, size in tiers if size)

    @cached_property
    def p_host(self) -> float:
        """Probability that the host's memory is enough."""
        return self.host.below(self.host_limit)

    @property
    def p_fits(self) -> float:
        """Probability that device and host are enough."""
        return self.p_device * self.p_host

    @cached_property
    def p_as_described(self) -> float:
        """The same if the program keeps what its stack says, and nothing else."""
        return self.device.as_described.below(self.memory_limit) * self.p_host

    @property
    def sure(self) -> bool:
        """Whether it fits, and most likely will if the program is as described."""
        return self.fits and self.p_as_described >= SURE

    @property
    def assurance(self) -> float:
        """By what plans are chosen before their speed: SURE where it is `sure`, so that all of those are
        alike; else `p_as_described`, of which less than a hundredth is none."""
        return SURE if self.sure else math.floor(100 * self.p_as_described) / 100 if self.fits else 0.0

    @property
    def chance(self) -> str:
        """'fits, as described, with probability 0.17' or 'out of memory'."""
        said = f"fits, as described, with probability {format_probability(self.p_as_described)}"
        return said if self.fits else self.verdict

    @property
    def verdict(self) -> str:
        """As `fitting_in_words`."""
        return fitting_in_words(self.fits, self.p_as_described)

    @property
    def odds(self) -> str:
        """'fits with probability 0.97' or 'out of memory'."""
        return f"fits with probability {format_probability(self.p_fits)}" if self.fits else self.verdict

    @property
    def waits(self) -> dict[str, float]:
        """`exposed` under the names that people see."""
        return shown_as(self.exposed)

    @property
    def exposed_share(self) -> float:
        """Share of the step in which compute waits for communication, copies, the host or other stages."""
        return sum(self.exposed.values()) / self.step_time

    @property
    def drawn_microbatches(self) -> int:
        """Microbatches of which there are spans: repetitions that are composed have none."""
        return len({span.microbatch for span in self.spans if span.microbatch >= 0})

    def step_time_interval(self, level: float = 0.9) -> tuple[float, float]:
        """Seconds between which a measured step lies with probability `level`."""
        return of_step_time(self.facts).interval(self.step_time, level)

    def times_as_fast_as(self, other: "SimResult") -> Ratio:
        """How many times as fast this step is as another of as many tokens, and how surely."""
        return ratio(self.step_time, self.facts, other.step_time, other.facts)

    def peak_memory_interval(self, level: float = 0.9) -> tuple[float, float]:
        """Bytes of live tensors between which a measured peak lies with probability `level`."""
        return of_peak_memory(self.facts).interval(self.peak_memory, level)

    @cached_property
    def corrected_step_time(self) -> float | None:
        """Seconds by what the profile saw of the user's own runs, as likely too many as too few; None where
        it saw none."""
        seen = any(one.step_time is not None for one in self.facts.seen)
        return of_step_time(self.facts).middle(self.step_time) if seen else None

    @property
    def ranked_time(self) -> float:
        """Seconds by which plans are told apart: corrected where the profile saw runs, else simulated."""
        return self.step_time if self.corrected_step_time is None else self.corrected_step_time

    @cached_property
    def corrected_peak_memory(self) -> float | None:
        """The same of a peak of tensors, bytes."""
        seen = any(one.peak_memory is not None for one in self.facts.seen)
        return of_peak_memory(self.facts).middle(self.peak_memory) if seen else None

    def intervals(self, level: float = 0.9) -> dict[str, Any]:
        """The keys of every prediction's uncertainty."""
        return {
            "interval": level,
            "step_time_interval_s": list(self.step_time_interval(level)),
            "peak_memory_interval_bytes": list(self.peak_memory_interval(level)),
            "peak_memory_interval_against": against(self.facts),
            "step_time_corrected_s": self.corrected_step_time,
            "peak_memory_corrected_bytes": self.corrected_peak_memory,
            "p_fits": self.p_fits,
            "p_fits_as_described": self.p_as_described,
        }

    def to_json(self, level: float = 0.9) -> dict[str, Any]:
        """The keys of `mopsim simulate --json`: seconds, bytes, FLOP/s. level: of the intervals.

        Keys with `corrected` are what the user's own runs make of simulated values, null on a profile that
        saw none. peak_memory_bytes and its interval are of tensors alone. peak_memory_upper_bytes and
        host_memory_upper_bytes are enough with probability UPPER for those and for what may come on top of
        them (above_peak_bytes, above_host_bytes), by which p_fits is judged. each: what a device is called.
        """
        return {
            **self.intervals(level),
            "step_time_s": self.step_time,
            "tokens_per_s": self.tokens_per_second,
            "tokens_per_s_per_device": self.tokens_per_second_per_device,
            "each": self.each,
            "model_flops_per_s_per_device": self.model_flops_per_second_per_device,
            "mfu": self.mfu,
            "fits": self.fits,
            "verdict": self.verdict,
            "over": self.over,
            "over_bytes": self.over_bytes,
            "peak_memory_bytes": self.peak_memory,
            "peak_memory_upper_bytes": round(self.device.quantile(UPPER)),
            "above_peak_bytes": self.above_peak,
            "memory_limit_bytes": self.memory_limit,
            "memory_by_category_bytes": self.memory_by_category,
            "peak_at": {"time_s": self.peak_time, "component": self.peak_component, "phase": self.peak_phase},
            "resident_memory_bytes": self.resident_memory,
            "host_memory_bytes": self.host_memory,
            "host_memory_upper_bytes": round(self.host.quantile(UPPER)),
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
