"""What a played step comes to: seconds, bytes by category, busy and exposed time -> SimResult."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import mopsim
from mopsim.common.io import digest
from mopsim.cost.compute import matmul_curve
from mopsim.engine import upper
from mopsim.engine.gaps import Turns, added
from mopsim.engine.ledger import Ledger
from mopsim.engine.record import Record
from mopsim.engine.result import SimResult
from mopsim.intervals.made import made_of
from mopsim.intervals.spread import Facts
from mopsim.program.workload import NUM_DEVICE_SLOTS, SLOTS, Program, Work, Workload
from mopsim.spec.categories import WAITING
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.model import ModelSpec
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec

Prices = dict[int, tuple[Work, float]]
"""Seconds of each work object alone, by its id."""
DEVICE, HOST = SLOTS[:NUM_DEVICE_SLOTS], SLOTS[NUM_DEVICE_SLOTS:]


@dataclass(frozen=True)
class PlayedStep:
    """A workload after it was played: a record and a ledger of each program. end: seconds, without what is
    repeated. profile_digest: of the profile as given; the step may have changed its curves. turns: what is
    repeated."""

    workload: Workload
    records: list[Record]
    ledgers: list[Ledger]
    prices: Prices
    end: float
    profile_digest: str
    turns: Turns

    @property
    def slowest(self) -> int:
        return max(range(len(self.records)), key=lambda i: self.records[i].end)

    @property
    def fullest(self) -> int:
        return max(range(len(self.ledgers)), key=lambda i: self.ledgers[i].peak)


def account(
    played: PlayedStep, model: ModelSpec, hardware: HardwareProfile, strategy: Strategy, training: TrainSpec
) -> SimResult:
    """The result of a played step."""
    workload = played.workload
    time = _time(played, hardware)
    tokens, step_time = training.global_batch * training.seq_len, time["step_time"]
    rate = workload.model_flops / step_time / strategy.world_size
    made = made_of(step_time, time["busy"], time["exposed"])
    result = SimResult(
        tokens_per_second=tokens / step_time,
        tokens_per_second_per_device=tokens / step_time / strategy.world_size,
        model_flops_per_second_per_device=rate,
        mfu=rate / matmul_peak(hardware, strategy),
        **time,
        **_memory(played, hardware, strategy),
        **_curves(played),
        guarantee_memory=workload.guarantee,
        strategy=strategy,
        training=training,
        stack=workload.stack,
        provenance={
            "profile": hardware.name,
            "profile_digest": played.profile_digest,
            "model": model.name,
            "model_digest": digest(model),
            "stack": workload.stack.name,
            "stack_digest": digest(workload.stack),
            "version": mopsim.__version__,
        },
        facts=Facts.of(workload.stack, hardware, strategy.precision, model, exact=workload.exact, made=made),
        each=hardware.each,
        routed=model.num_local_experts > 0,
        num_events=sum(len(one.ops) for one in workload.programs),
    )
    if result.fits and result.hopeless:
        most = _largest(result.memory_by_category) if result.missing_bytes[0] else "host"
        return replace(result, fits=False, over=most)
    return result


def _largest(categories: Mapping[str, int]) -> str:
    return max(categories, key=categories.__getitem__, default="framework")


def matmul_peak(hardware: HardwareProfile, strategy: Strategy) -> float:
    """FLOP/s of a strategy's products. Raises SpecError for a dtype without a curve."""
    precision = strategy.precision
    curve = matmul_curve(hardware, precision.compute)
    if precision.matmul != "compute":
        curve = matmul_curve(hardware, precision.matmul, field="strategy.precision.matmul")
    return curve.peak.si


def _time(played: PlayedStep, hardware: HardwareProfile) -> dict[str, Any]:
    """Seconds of the step of the rank that ends last, with microbatches and layers that are repeated."""
    workload, place = played.workload, played.slowest
    record, program = played.records[place], workload.programs[place]
    last, repeats, unit = workload.expanded - 1, workload.repeats, workload.unit
    period = played.turns.seconds
    often = dict.fromkeys(range(last - unit, last), 1 + repeats)
    first, share = last - played.turns.count, repeats * unit / played.turns.count
    weights = {i: 1 + share * (first <= i < last) for i in record.tallies}
    hidden = sum(weights[i] * seconds for i, seconds in added(program, record).items())
    between = hardware.step_overhead(workload.stack.runtime or workload.stack.name)
    busy, counts, flops = _totals(program, played.prices, [often.get(one, 1) for one in record.turns])
    components = _sum(record, "component", weights) | ({"runtime": between} if between else {})
    step_time = max(played.end + hidden + repeats * period + between, 1e-12)
    after = step_time - sum(components.values())  # its last op; copies to the host may end the step
    if abs(after) > 1e-9 * step_time:
        components[WAITING] = max(0.0, components.get(WAITING, 0.0) + after)
    exposed = _sum(record, "exposed", weights)
    if "peers" in exposed:  # how long it waits for other stages differs from turn to turn
        cycle = record.turn(last).ready - record.turn(first).ready
        exposed["peers"] = max(0.0, exposed["peers"] + repeats * period - share * cycle)
    return {
        "step_time": step_time,
        "time_by_component": components,
        "exposed": exposed,
        "busy": busy,
        "num_ops": counts,
        "flops": flops,
        "span_stage": program.stage,
        "spans": record.spans or [],
    }


def _memory(played: PlayedStep, hardware: HardwareProfile, strategy: Strategy) -> dict[str, Any]:
    """Bytes of the fullest rank, on the device and on the host, and whether they fit. Blocks that serve
    nobody have what communicators leave, and are given back before a device runs out of memory. A CPU has no
    caching allocator, no pools of streams and no communicators, and mopexec holds it to a limit of live
    tensors; a pool of the program's own (Stack.pool) has one for tensors too, and communicators beside it."""
    workload, place = played.workload, played.fullest
    ledger, op = played.ledgers[place], played.ledgers[place].peak_op
    limit, host_limit = hardware.memory_limit(), hardware.host_limit(strategy.world_size)
    framework = round((hardware.framework_memory_scale - 1.0) * ledger.peak)
    peak, host = ledger.peak + framework, max(one.host_peak for one in played.ledgers)
    categories = {name: size for name, size in zip(DEVICE, ledger.at_peak, strict=False) if size}
    if framework:
        categories["framework"] = categories.get("framework", 0) + framework
    on_host = _on_host(max(played.ledgers, key=lambda one: one.host_peak))
    cached = hardware.device_kind != "cpu" and not workload.stack.pool
    wires = upper.communication((work for work, _ in played.prices.values()), workload.exchange)
    idle = min(_idle(played, strategy), max(0, limit - peak - wires)) if cached else 0
    over = _largest(categories) if peak > limit else "host" if host > host_limit else None
    return {
        "fits": over is None,
        "over": over,
        "peak_memory": peak,
        "reserved_memory": peak + idle,
        "memory_limit": limit,
        "set_aside": int(hardware.device.memory.si) - limit,
        "memory_by_category": categories,
        "peak_by_stage": tuple(round(hardware.framework_memory_scale * one.peak) for one in played.ledgers),
        "highest_by_category": dict(zip(DEVICE, ledger.high, strict=False)),
        "peak_by_phase": ledger.by_phase,
        "peak_time": _peak_time(workload.programs[place], played.records[place], ledger),
        "peak_component": op.component if op else "other",
        "peak_phase": op.phase if op else "optimizer",
        "resident_memory": sum(ledger.resident[:NUM_DEVICE_SLOTS]),
        "host_memory": host,
        "host_limit": host_limit,
        "host_by_category": on_host,
        "above_peak": upper.device(peak, _copies(played, strategy), wires, _holes(played)) if cached else {},
        "above_host": upper.host(on_host, workload.pinned) if cached else {},
        "memory_stage": workload.programs[place].stage,
    }


def _idle(played: PlayedStep, strategy: Strategy) -> int:
    """Bytes that torch's caching allocator has by the end of the step beside the peak, if it has the room:
    the pool of each stream keeps its own highest (`upper.idle_blocks`), whenever that was, flat tensors of
    the step's end have blocks of their own (`upper.cached_blocks`), and at the loss there is the block of
    logits that were cast."""
    workload, ledger = played.workload, played.ledgers[played.fullest]
    now, high = (dict(zip(SLOTS, values, strict=True)) for values in (ledger.at_peak, ledger.high))
    sharding = workload.stack.under(strategy.dense.zero).sharding
    at_loss = ledger.peak_op is not None and ledger.peak_op.component == "vocabulary"
    cast = workload.cast if at_loss else 0
    if sharding.one_pool:
        return cast
    if sharding.fsdp:
        return ledger.rest + high["gathered"] + high["grads"] - ledger.peak + cast
    passes = [size for phase, size in ledger.by_phase.items() if phase != "optimizer"]
    blocks = workload.programs[played.fullest].blocks
    flat = upper.cached_blocks(blocks, max(passes, default=0), ledger.peak)
    return upper.idle_blocks(sharding, strategy, now, high) + flat + cast


def _copies(played: PlayedStep, strategy: Strategy) -> int:
    """Bytes that tensors which the ledger does not have take on top of its peak: the copy that DeepSpeed
    sends, and flat tensors of the step's end beside what is resident."""
    workload, ledger = played.workload, played.ledgers[played.fullest]
    resident, blocks = sum(ledger.resident[:NUM_DEVICE_SLOTS]), workload.programs[played.fullest].blocks
    flat = upper.cached_blocks(blocks, resident, ledger.peak)
    return upper.sent_copy(workload.stack.under(strategy.dense.zero).sharding, strategy) + flat


def _holes(played: PlayedStep) -> int:
    """Bytes on top of the fullest rank's peak for blocks around logits that the stage with the loss gathers
    whole."""
    peaks = ((ledger.peak, ledger.peak_op) for ledger in played.ledgers)
    losses = (peak for peak, op in peaks if op and op.component == "vocabulary")
    return upper.around_logits(
        played.workload.gathered, played.ledgers[played.fullest].peak, max(losses, default=0)
    )


def _on_host(ledger: Ledger) -> dict[str, int]:
    """Bytes on the host by category, at their peak."""
    found = zip(HOST, ledger.at_host_peak[NUM_DEVICE_SLOTS:], strict=True)
    return {name.removeprefix("host/"): size for name, size in found if size}


def _curves(played: PlayedStep) -> dict[str, Any]:
    """Memory of the fullest rank over time, where it was kept."""
    curve = played.ledgers[played.fullest].curve
    if curve is None:
        return {}
    return {
        "memory_curve": [(time, sum(now[:NUM_DEVICE_SLOTS])) for time, now in curve],
        "memory_curve_by_category": {
            name: [now[slot] for _, now in curve] for slot, name in enumerate(DEVICE)
        },
    }


def _peak_time(program: Program, record: Record, ledger: Ledger) -> float:
    """Seconds from the start of the step (of the microbatches that are played) to the peak."""
    if ledger.peak_op is None:
        return ledger.peak_time
    return ledger.peak_time + sum(added(program, record, ledger.peak_op.index).values())


def _totals(
    program: Program, prices: Prices, weights: list[int]
) -> tuple[dict[str, float], dict[str, int], float]:
    """Busy seconds and ops by kind, and FLOP, of the step of one rank. weights: how often each op is done."""
    uses: dict[int, int] = {}
    for op, times in zip(program.ops, weights, strict=True):
        weight = times * op.times
        for work in op.work:
            uses[id(work)] = uses.get(id(work), 0) + weight
    busy: dict[str, float] = {}
    counts: dict[str, int] = {}
    flops = 0.0
    for key, times in uses.items():
        work, price = prices[key]
        busy[work.kind] = busy.get(work.kind, 0.0) + times * price
        counts[work.kind] = counts.get(work.kind, 0) + int(times * work.issued)
        flops += times * (work.flops + 2 * work.m * work.n * work.k * work.count)
    return busy, counts, flops


def _sum(record: Record, field: str, weights: dict[int, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for index, tally in record.tallies.items():
        for key, value in getattr(tally, field).items():
            found[key] = found.get(key, 0.0) + weights[index] * value
    return found
