"""One step of one strategy, played: workload -> seconds per op -> streams and ledger -> SimResult."""

from collections.abc import Sequence

from msgspec.structs import replace

import mopsim
from mopsim.common.errors import require
from mopsim.common.io import digest
from mopsim.cost import seconds
from mopsim.cost.compute import for_heads, matmul_curve
from mopsim.engine import upper
from mopsim.engine.gaps import added, steady
from mopsim.engine.ledger import Ledger
from mopsim.engine.record import Record
from mopsim.engine.result import SimResult
from mopsim.engine.streams import play
from mopsim.lowering import lower
from mopsim.lowering.workload import NUM_DEVICE_SLOTS, SLOTS, Program, Work, Workload
from mopsim.spec.hardware import HardwareProfile, MatmulCurve
from mopsim.spec.model import ModelSpec
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec


def simulate(
    model: ModelSpec,
    hardware: HardwareProfile,
    num_nodes: int,
    strategy: Strategy,
    training: TrainSpec,
    stack: Stack | None = None,
    *,
    timeline: bool = False,
) -> SimResult:
    """Simulate one optimizer step. stack: that which the strategy names, where none is given. Raises
    SpecError where the inputs do not fit together; never for lack of memory."""
    stack = stack or load_stack(strategy.stack, "strategy.stack")
    if strategy.stack != stack.name:
        strategy = replace(strategy, stack=stack.name)
    ranks = num_nodes * hardware.devices_per_node
    require(
        strategy.world_size <= ranks,
        "strategy.world_size",
        strategy.world_size,
        f"is more than the {ranks} devices of {num_nodes} node(s) of {hardware.name}",
    )
    workload = lower(model, strategy, training, hardware.scale_up_size, stack, compose=not timeline)
    return run(workload, model, hardware, strategy, training, timeline=timeline)


def run(
    workload: Workload,
    model: ModelSpec,
    hardware: HardwareProfile,
    strategy: Strategy,
    training: TrainSpec,
    *,
    timeline: bool = False,
) -> SimResult:
    """Play a lowered workload on a profile."""
    stack = workload.stack
    curve = _curve(hardware, strategy)
    priced = for_heads(hardware, model.head_dim)
    prices: dict[int, tuple[Work, float]] = {}
    durations = [_durations(program, priced, prices) for program in workload.programs]
    limit, host_limit = hardware.memory_limit(), hardware.host_limit(strategy.world_size)
    ledgers = [Ledger(program.resident, limit, timeline) for program in workload.programs]
    records = [Record(timeline, _kinds(program, prices)) for program in workload.programs]
    issue = hardware.host.issue.si if hardware.host.issue else 0.0
    share = hardware.communication_share
    end = play(workload.programs, durations, ledgers, records, share, issue)
    if workload.whole and not all(
        steady(program, record, end) for program, record in zip(workload.programs, records, strict=True)
    ):
        return run(workload.whole(), model, hardware, strategy, training, timeline=timeline)
    for program, ledger in zip(workload.programs, ledgers, strict=True):
        assert ledger.now == ledger.resident, f"stage {program.stage}: memory left over {_left(ledger)}"

    slowest = max(range(len(records)), key=lambda i: records[i].end)
    fullest = max(range(len(ledgers)), key=lambda i: ledgers[i].peak)
    record, ledger, program = records[slowest], ledgers[fullest], workload.programs[slowest]
    expanded, unit = workload.expanded, workload.unit
    repeats = (workload.microbatches - expanded) // unit
    period = _period(record, expanded, unit) if repeats else 0.0
    between = hardware.step_overhead(stack.runtime or stack.name)
    weights = {i: 1 + repeats * (expanded - 1 - unit <= i < expanded - 1) for i in record.tallies}
    hidden = sum(weights[i] * seconds for i, seconds in added(program, record).items())
    step_time = max(end + hidden + repeats * period + between, 1e-12)
    busy, counts, flops = _totals(program, prices, weights)
    framework = round((hardware.framework_memory_scale - 1.0) * ledger.peak)
    peak = ledger.peak + framework
    host = max(one.host_peak for one in ledgers)
    fullest_host = max(ledgers, key=lambda one: one.host_peak)
    on_host = {
        name.removeprefix("host/"): size
        for name, size in zip(
            SLOTS[NUM_DEVICE_SLOTS:], fullest_host.at_host_peak[NUM_DEVICE_SLOTS:], strict=True
        )
        if size
    }
    categories = {
        name: size for name, size in zip(SLOTS, ledger.at_peak[:NUM_DEVICE_SLOTS], strict=False) if size
    }
    if framework:
        categories["framework"] = categories.get("framework", 0) + framework
    over = ledger.over or ("framework" if peak > limit else None)
    if over is None and host > host_limit:
        over = "host"
    tokens = training.global_batch * training.seq_len
    model_rate = workload.model_flops / step_time / strategy.world_size
    return SimResult(
        step_time=step_time,
        tokens_per_second=tokens / step_time,
        tokens_per_second_per_device=tokens / step_time / strategy.world_size,
        model_flops_per_second_per_device=model_rate,
        mfu=model_rate / curve.peak.si,
        fits=over is None,
        over=over,
        over_bytes=max(0, peak - limit) or max(0, host - host_limit),
        peak_memory=peak,
        memory_limit=limit,
        memory_by_category=categories,
        peak_by_stage=tuple(round(hardware.framework_memory_scale * one.peak) for one in ledgers),
        highest_by_category=dict(zip(SLOTS, ledger.high[:NUM_DEVICE_SLOTS], strict=False)),
        peak_time=_peak_time(workload.programs[fullest], records[fullest], ledger),
        peak_component=ledger.peak_op.component if ledger.peak_op else "other",
        peak_phase=ledger.peak_op.phase if ledger.peak_op else "optimizer",
        resident_memory=sum(ledger.resident[:NUM_DEVICE_SLOTS]),
        host_memory=host,
        host_limit=host_limit,
        host_by_category=on_host,
        above_peak=_above_peak(workload, hardware, ledger, peak, prices),
        above_host={} if hardware.device_kind == "cpu" else upper.host(on_host, workload.pinned),
        guarantee_memory=workload.guarantee,
        exposed=_sum(record, "exposed", weights),
        busy=busy,
        time_by_component=_sum(record, "component", weights) | ({"runtime": between} if between else {}),
        num_ops=counts,
        flops=flops,
        strategy=strategy,
        training=training,
        stack=stack,
        provenance={
            "profile": hardware.name,
            "profile_digest": digest(hardware),
            "model": model.name,
            "model_digest": digest(model),
            "stack": stack.name,
            "stack_digest": digest(stack),
            "version": mopsim.__version__,
        },
        num_events=sum(len(one.ops) for one in workload.programs),
        span_stage=program.stage,
        memory_stage=workload.programs[fullest].stage,
        spans=record.spans or [],
        memory_curve=[(time, sum(now[:NUM_DEVICE_SLOTS])) for time, now in ledger.curve or []],
        memory_curve_by_category={
            name: [now[slot] for _, now in ledger.curve or []]
            for slot, name in enumerate(SLOTS[:NUM_DEVICE_SLOTS])
        }
        if timeline
        else {},
    )


def _peak_time(program: Program, record: Record, ledger: Ledger) -> float:
    """Seconds from the start of the step (of the microbatches that are played) to the peak."""
    if ledger.peak_op is None:
        return ledger.peak_time
    return ledger.peak_time + sum(added(program, record, ledger.peak_op.index).values())


def _durations(
    program: Program, hardware: HardwareProfile, prices: dict[int, tuple[Work, float]]
) -> list[float]:
    """Seconds of every op alone on its stream. Work is priced once per object: equal work is shared."""
    found = []
    for op in program.ops:
        total = 0.0
        for work in op.work:
            priced = prices.get(id(work))
            if priced is None:
                priced = prices[id(work)] = (work, seconds(work, hardware))
            total += priced[1]
        found.append(total)
    return found


def _kinds(program: Program, prices: dict[int, tuple[Work, float]]) -> dict[int, dict[str, float]]:
    """Of ops beside compute that are of several kinds of work: each kind's share of the seconds."""
    found: dict[int, dict[str, float]] = {}
    for op in program.ops:
        if op.stream == "compute" or len(op.work) < 2:
            continue
        total = sum(prices[id(work)][1] for work in op.work) or 1.0
        shares = found[op.index] = {}
        for work in op.work:
            shares[work.kind] = shares.get(work.kind, 0.0) + prices[id(work)][1] / total
    return found


def _totals(
    program: Program, prices: dict[int, tuple[Work, float]], weights: dict[int, int]
) -> tuple[dict[str, float], dict[str, int], float]:
    """Busy seconds and ops by kind, and FLOP, of the step of one rank."""
    uses: dict[int, int] = {}
    for op in program.ops:
        weight = weights.get(op.microbatch, 1) * op.times
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


def _period(record: Record, expanded: int, unit: int) -> float:
    """Seconds that one more repetition adds: between the starts of the last two that were expanded."""
    return record.tallies[expanded - 1].start - record.tallies[expanded - 1 - unit].start


def _sum(record: Record, field: str, weights: dict[int, int]) -> dict[str, float]:
    found: dict[str, float] = {}
    for index, tally in record.tallies.items():
        for key, value in getattr(tally, field).items():
            found[key] = found.get(key, 0.0) + weights[index] * value
    return found


def _above_peak(
    workload: Workload,
    hardware: HardwareProfile,
    fullest: Ledger,
    peak: int,
    prices: dict[int, tuple[Work, float]],
) -> dict[str, int]:
    """Bytes above the peak by cause, of the fullest rank. A CPU has no caching allocator, no pools of streams
    and no communicators, and mopexec holds it to a limit of live tensors."""
    if hardware.device_kind == "cpu":
        return {}
    now = dict(zip(SLOTS, fullest.at_peak, strict=True))
    pools = upper.idle_blocks(workload.stack.sharding.fsdp, now, dict(zip(SLOTS, fullest.high, strict=True)))
    wires = upper.communication(work for work, _ in prices.values())
    return upper.device(peak, pools, wires, 0.0 if workload.exact else upper.PROGRAM)


def _curve(hardware: HardwareProfile, strategy: Strategy) -> MatmulCurve:
    """That of a strategy's products. Raises SpecError for a dtype without one, its recipe's or its own."""
    precision = strategy.precision
    curve = matmul_curve(hardware, precision.compute)
    if precision.matmul == "compute":
        return curve
    return matmul_curve(hardware, precision.matmul, field="strategy.precision.matmul")


def _left(ledger: Ledger) -> Sequence[tuple[str, int]]:
    return [
        (SLOTS[i], now - then)
        for i, (now, then) in enumerate(zip(ledger.now, ledger.resident, strict=True))
        if now != then
    ]
