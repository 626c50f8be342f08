"""Simulate cases: equal ones once, on a few processes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from dataclasses import field as fresh

import numpy as np
from msgspec.structs import replace

from mopsim.common.errors import MopError
from mopsim.common.processes import pool, workers
from mopsim.common.units import DTYPE_BYTES
from mopsim.engine import SimResult, run
from mopsim.intervals.made import Made, made_of
from mopsim.program import lower
from mopsim.program.workload import Workload
from mopsim.spec.hardware import HardwareProfile, Quantity
from mopsim.spec.reading import Reading
from mopsim.validate.case import Case
from mopsim.validate.workspaces import workspaces

ISSUES = (35e-6, 0.0, 100e-6, 60e-6, 20e-6, 10e-6)
"""Seconds of the host for each kernel that are simulated for the calibration: first one that is above all
that profiles have (13.5 and 16.2 us) by four times their scatter, and none."""
SAME = 1e-3
"""Relative difference between these two below which the host does not matter, and by which a step may be
wrong between others."""
RESERVED = {"fixed": 1.10, "expandable": 1.05}
"""Blocks of the caching allocator over live tensors and idle blocks, by its segments: the medians of 13 and
18 sources of published runs that read blocks or the whole device (1.097 and 1.047, reports/validation; half
of them lie within 1.09 to 1.16 and 1.03 to 1.07)."""

COMMUNICATORS = 2 * 411 * 10**6
"""Bytes of communicators that a profile's `reserved` has already: two groups, as those of A100, H100 and H200
say. Those of other cards say up to half a GB more or less."""


@dataclass(frozen=True)
class Simulated:
    """What is kept of a simulation. error: why there is none; field: of what.

    paces: (seconds of the host for each kernel, seconds of the step), by rising cost; empty where the host
    does not matter. Bytes: peak_memory of the ranks whose memory is read; fullest: of the fullest rank;
    libraries: what torch's allocator has beside tensors (mopsim.validate.workspaces).
    idle_blocks, communication: see mopsim.engine.upper; above: what may come on top of the fullest, at most;
    limit: what a device may use. p_host: probability that the host has enough. busy, exposed: seconds by
    kind.
    """

    step_time: float = 0.0
    paces: tuple[tuple[float, float], ...] = ()
    peak_memory: int = 0
    fullest: int = 0
    idle_blocks: int = 0
    libraries: int = 0
    communication: int = 0
    above: int = 0
    limit: int = 0
    p_host: float = 1.0
    fits: bool = True
    error: str = ""
    field: str = ""
    busy: dict[str, float] = fresh(default_factory=dict)
    exposed: dict[str, float] = fresh(default_factory=dict)

    @property
    def made(self) -> Made:
        return made_of(self.step_time, self.busy, self.exposed)


Progress = Callable[[int, int], None]


def simulate_case(case: Case, *, paced: bool = True) -> Simulated:
    """One case, uncalibrated; a refusal becomes `error`. paced: at several costs of the host too, where the
    time was measured, to be calibrated on."""
    try:
        model, hardware, stack = case.network(), case.profile(), case.program()
        stack = stack.on_kind(hardware.device_kind)
        strategy = case.resolved()
        domain, on = hardware.scale_up_size, hardware.device.architecture
        workload = lower(model, strategy, case.training, domain, stack, architecture=on)
        result = run(workload, model, hardware, strategy, case.training)
        paced = paced and bool(case.measured.step_time and hardware.host.cpu_launch_time)
        paces = _paces(case, _as_played(workload, result.num_events)) if paced else ()
    except MopError as error:
        return Simulated(error=str(error), field=str(error).split(":")[0])
    except (AssertionError, ArithmeticError, LookupError, ValueError, TypeError) as error:
        return Simulated(error=f"simulator failed: {type(error).__name__} {error}", field="simulator")
    first, last = stack.reading.first_stage, stack.reading.last_stage
    peak = result.peak_by_stage[-1 if last else 0] if first or last else result.peak_memory
    if stack.reading.first_step:
        peak = _first_step(result)
    return Simulated(
        step_time=result.step_time, paces=paces, peak_memory=peak, fullest=result.peak_memory,
        idle_blocks=result.reserved_memory - result.peak_memory, libraries=workspaces(stack, model, hardware),
        communication=result.above_peak.get("communication", 0), above=sum(result.above_peak.values()),
        limit=result.memory_limit, p_host=result.p_host, fits=result.fits,
        busy=dict(result.busy), exposed=dict(result.exposed),
    )  # fmt: skip


def _first_step(result: SimResult) -> int:
    """The peak of a first step, in whose forward and backward there are no moments."""
    precision, phases = result.strategy.precision, result.peak_by_phase
    moments = 2 * int(DTYPE_BYTES[precision.moments])
    absent = result.memory_by_category.get("optimizer", 0) * moments // (moments + precision.own_master)
    passes = max(size for phase, size in phases.items() if phase != "optimizer")
    return max(passes - absent, phases.get("optimizer", 0))


def _paces(case: Case, workload: Workload) -> tuple[tuple[float, float], ...]:
    profile = case.profile()

    def step(issue: float) -> float:
        hardware = replace(profile, host=replace(profile.host, cpu_launch_time=_seconds(issue)))
        return run(workload, case.network(), hardware, case.resolved(), case.training).step_time

    return paces_of(step)


def paces_of(step: Callable[[float], float]) -> tuple[tuple[float, float], ...]:
    """Seconds of a step (`step`) by the host's for each kernel, at as many of ISSUES as tell it at all."""
    found: dict[float, float] = {}
    for issue in ISSUES:
        if _known(found, issue):
            continue
        found[issue] = step(issue)
        if issue == 0.0 and found[ISSUES[0]] < found[issue] * (1 + SAME):
            return ()
    return tuple(sorted(found.items()))


def _as_played(workload: Workload, events: int) -> Workload:
    """The workload of so many ops: an interleaved pipeline that had to be played longer has to be again."""
    while workload.unit > 1 and workload.longer and sum(len(one.ops) for one in workload.programs) < events:
        workload = workload.longer()
    return workload


def _known(found: dict[float, float], issue: float) -> bool:
    """Whether the step there is told by those around it. A step is the longest of many sums of times, some of
    them of kernels that the host starts: a convex function of its time for each, so it lies under the chord
    between two neighbours and above the chords beyond them, made longer."""
    costs = sorted(found)
    place = int(np.searchsorted(costs, issue))
    if not 0 < place < len(costs):
        return False
    low, chord = found[costs[place - 1]], _line(found, issue, *costs[place - 1 : place + 1])
    beyond = (costs[place - 2 : place], costs[place : place + 2])
    low = max([low, *(_line(found, issue, *pair) for pair in beyond if len(pair) == 2)])
    return chord - low <= SAME * chord


def _line(found: dict[float, float], issue: float, one: float, other: float) -> float:
    """The straight line through two of them."""
    slope = (found[other] - found[one]) / (other - one)
    return found[one] + slope * (issue - one)


def _seconds(value: float) -> Quantity:
    return Quantity(value=value, unit="s", tag="assumed", source="one of the values that are simulated")


def simulate_all(cases: Sequence[Case], jobs: int = 0, progress: Progress | None = None) -> list[Simulated]:
    """Results in the order of `cases`. jobs: processes, 0 = as many as there are cores, at most 4."""
    keys, first = [case.alike() for case in cases], dict[tuple[object, ...], Case]()
    for key, case in zip(keys, cases, strict=True):
        first.setdefault(key, case)
    unique = list(first.values())
    count = min(workers(jobs), max(1, len(unique) // 8))
    if count <= 1:
        found = _collect(map(simulate_case, unique), len(unique), progress)
    else:
        with pool(count) as processes:
            found = _collect(processes.map(simulate_case, unique, chunksize=4), len(unique), progress)
    by_key = dict(zip(first, found, strict=True))
    return [by_key[key] for key in keys]


def _collect(results: Iterable[Simulated], total: int, progress: Progress | None) -> list[Simulated]:
    found = []
    for result in results:
        found.append(result)
        if progress is not None:
            progress(len(found), total)
    return found


def as_read(result: Simulated, reading: Reading, hardware: HardwareProfile) -> float:
    """Bytes that the source's instrument would show for a simulated peak of live tensors. The allocator gives
    blocks that serve nobody back before it runs out of memory. A profile's `reserved` has the libraries'."""
    if reading.memory == "allocated":
        return float(result.peak_memory + result.libraries)
    blocks = (result.peak_memory + result.idle_blocks) * RESERVED[reading.segments]
    blocks = min(blocks, float(max(result.peak_memory, result.limit)))
    beside = hardware.device.reserved.si + max(0, result.communication - COMMUNICATORS)
    return blocks + beside if reading.memory == "device" else blocks + result.libraries
