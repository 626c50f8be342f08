"""One step of one strategy, played: workload -> seconds per op -> streams and ledger -> SimResult."""

from collections.abc import Sequence

from msgspec.structs import replace

from mopsim.common.errors import require
from mopsim.common.garbage import collected_later
from mopsim.common.io import digest
from mopsim.cost import seconds
from mopsim.cost.stack import as_used, waiting
from mopsim.engine.account import PlayedStep, Prices, account, matmul_peak
from mopsim.engine.beside import beside
from mopsim.engine.gaps import ShorterPlay, repeated, steady
from mopsim.engine.ledger import Ledger
from mopsim.engine.links import uses
from mopsim.engine.queue import order
from mopsim.engine.record import Record
from mopsim.engine.result import SimResult
from mopsim.engine.streams import play
from mopsim.program import lower
from mopsim.program.workload import SLOTS, Program, Workload
from mopsim.spec.capability import Job, refusals
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.model import ModelSpec
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec


@collected_later()
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
    stack = (stack or load_stack(strategy.stack, "strategy.stack")).on_kind(hardware.device_kind)
    if strategy.stack != stack.name:
        strategy = replace(strategy, stack=stack.name)
    strategy = stack.resolve(strategy)
    ranks = num_nodes * hardware.devices_per_node
    rule = f"is more than the {ranks} devices of {num_nodes} node(s) of {hardware.name}"
    require(strategy.world_size <= ranks, "strategy.world_size", strategy.world_size, rule)
    domain, on = hardware.scale_up_size, hardware.device.architecture
    workload = lower(model, strategy, training, domain, stack, architecture=on, compose=not timeline)
    for refused in refusals(Job(model, strategy, training, stack, hardware), by="simulator"):
        raise refused
    return run(workload, model, hardware, strategy, training, timeline=timeline)


def run(
    workload: Workload,
    model: ModelSpec,
    hardware: HardwareProfile,
    strategy: Strategy,
    training: TrainSpec,
    *,
    timeline: bool = False,
    before: ShorterPlay | None = None,
) -> SimResult:
    """Play a lowered workload on a profile. Composed layers and microbatches that turn out not to repeat each
    other are played. before: with fewer microbatches."""
    matmul_peak(hardware, strategy)
    used = as_used(hardware, workload.stack, model, training)
    used = waiting(used, strategy.world_size)
    prices: Prices = {}
    durations = [_durations(program, used, prices) for program in workload.programs]
    records = [Record(timeline, _kinds(program, prices)) for program in workload.programs]
    issue = used.host.cpu_launch_time.si if used.host.cpu_launch_time else 0.0
    besides = [beside(program, used, workload.stack, prices) for program in workload.programs]
    links = [uses(program, used, prices) for program in workload.programs]
    one = workload.stack.queue(used.device.architecture, strategy) == "one"
    orders = [order(*each, prices) for each in zip(workload.programs, durations, strict=True) if one]
    programs, blocking = workload.programs, workload.stack.host.blocking
    end = play(programs, durations, records, besides, links, issue, blocking=blocking, orders=orders)
    played = list(zip(workload.programs, records, strict=True))
    if workload.whole and not all(steady(program, record, end) for program, record in played):
        return run(workload.whole(), model, hardware, strategy, training, timeline=timeline)
    turns = repeated(workload, records, end, before)
    if turns is None:
        assert workload.longer, "a program of one stage repeats its own last turn"
        before = ShorterPlay(workload.expanded, end)
        return run(workload.longer(), model, hardware, strategy, training, timeline=timeline, before=before)
    ledgers = [Ledger(program.resident, timeline) for program in workload.programs]
    for (program, record), ledger in zip(played, ledgers, strict=True):
        ledger.play(program.ops, record.moves, record.starts, record.ends)
        assert ledger.now == ledger.resident, f"stage {program.stage}: memory left over {_left(ledger)}"
    step = PlayedStep(workload, records, ledgers, prices, end, digest(hardware), turns)
    return account(step, model, used, strategy, training)


def _durations(program: Program, hardware: HardwareProfile, prices: Prices) -> list[float]:
    """Seconds of every op alone on its stream. Work is priced once per object: equal work is shared."""
    totals = []
    for op in program.alike.firsts:
        total = 0.0
        for one in op.work:
            priced = prices.get(id(one))
            if priced is None:
                priced = prices[id(one)] = (one, seconds(one, hardware))
            total += priced[1]
        totals.append(total)
    return program.alike.each(totals)


def _kinds(program: Program, prices: Prices) -> dict[int, dict[str, float]]:
    """Of ops beside compute that are of several kinds of work: each kind's share of the seconds."""
    found: dict[int, dict[str, float]] = {}
    for kind, op in enumerate(program.alike.firsts):
        if op.stream == "compute" or len(op.work) < 2:
            continue
        total = sum(prices[id(work)][1] for work in op.work) or 1.0
        shares = found[kind] = {}
        for work in op.work:
            shares[work.kind] = shares.get(work.kind, 0.0) + prices[id(work)][1] / total
    return program.alike.some(found)


def _left(ledger: Ledger) -> Sequence[tuple[str, int]]:
    return [
        (SLOTS[i], now - then)
        for i, (now, then) in enumerate(zip(ledger.now, ledger.resident, strict=True))
        if now != then
    ]
