"""One contender on one cluster over lengths: a search a length, ascending, until nothing fits."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from mopsim.common.errors import MopError
from mopsim.common.processes import pool, workers
from mopsim.context.contenders import Contender
from mopsim.engine import SimResult, simulate
from mopsim.search import Options, search
from mopsim.search.problem import Problem
from mopsim.size.counts import global_batch
from mopsim.spec.documents import Documents, at_length, training_fields
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.model import ModelSpec
from mopsim.spec.routing import RoutingProfile
from mopsim.spec.strategy import DType, Strategy
from mopsim.spec.training import TrainSpec

INSISTENCE = 2
"""Before a length is said not to fit, it is searched once more with so many times the budget."""


TOP = 3
"""So many of the best at a length are tried at the next."""


@dataclass(frozen=True)
class ContextCase:
    """A network on a cluster. tokens_per_device: of one optimizer step; a step is never less than one
    sequence for every group of ranks that shares one. accumulate: in several microbatches where that is
    faster; otherwise in one, as large as is best. documents: of packed sequences, where attention does not
    cross them."""

    model: ModelSpec
    hardware: HardwareProfile
    nodes: int
    tokens_per_device: int
    accumulate: bool = True
    routing: RoutingProfile = "balanced"
    precision: DType = "bfloat16"
    documents: Documents = 0

    @property
    def world_size(self) -> int:
        return self.nodes * self.hardware.devices_per_node

    def problem(self, contender: Contender, seq_len: int, global_batch: int) -> Problem:
        """What is asked for a contender at one length."""
        apart = training_fields(at_length(self.documents, seq_len))
        training = TrainSpec(seq_len=seq_len, global_batch=global_batch, routing=self.routing, **apart)
        return Problem(self.model, self.hardware, self.nodes, training, self.precision, contender.software)


@dataclass(frozen=True)
class ContextPoint:
    """The best of a contender at one length, or what stops it. result: the best, else the closest that
    misses; None where no strategy is legal (`why`). gap: how much faster than it a strategy that the
    search left out can be at most, as a fraction (0 where nothing is sure to fit). small: of the smallest
    legal step, one sequence for each group of ranks that shares one, as the whole step of the case does not
    fit."""

    seq_len: int
    global_batch: int
    result: SimResult | None
    why: str = ""
    small: bool = False
    gap: float = 0.0

    @property
    def fits(self) -> bool:
        return self.result is not None and self.result.fits

    @property
    def verdict(self) -> str:
        """fits, may not fit, out of memory, or not legal."""
        return self.result.verdict if self.result else "not legal"

    @property
    def sure(self) -> bool:
        """Whether it fits, and most likely will."""
        return self.result is not None and self.result.sure

    @property
    def assurance(self) -> float:
        """By what plans are chosen before their speed."""
        return self.result.assurance if self.result else 0.0

    @property
    def throughput(self) -> float | None:
        """Tokens per second and device, where it fits."""
        return self.result.tokens_per_second_per_device if self.result and self.result.fits else None

    @property
    def stopped_by(self) -> str:
        """The category that takes most at the peak of the strategy that misses by least."""
        if self.fits:
            return ""
        return self.result.over or "memory" if self.result else self.why


@dataclass(frozen=True)
class Task:
    """What one process works on. key: the caller's, to know the curve by."""

    key: tuple[str, ...]
    case: ContextCase
    contender: Contender
    lengths: Sequence[int]
    budget: int


@dataclass(frozen=True)
class Curve:
    """Points in order of length, the last being the first that does not fit (or the longest asked)."""

    contender: Contender
    points: list[ContextPoint] = field(default_factory=list)
    seconds: float = 0.0
    simulated: int = 0

    @property
    def longest(self) -> ContextPoint | None:
        """The point of the longest length that fits."""
        return next((point for point in reversed(self.points) if point.fits), None)

    @property
    def whole(self) -> ContextPoint | None:
        """The point of the longest length that fits with the whole step of the case."""
        return next((point for point in reversed(self.points) if point.fits and not point.small), None)

    @property
    def end(self) -> ContextPoint | None:
        """The first point that does not fit."""
        return next((point for point in self.points if not point.fits), None)

    def at(self, seq_len: int) -> ContextPoint | None:
        return next((point for point in self.points if point.seq_len == seq_len), None)


def sweep(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[tuple[str, ...], Curve]]:
    """(key, curve) of every task as it is done, the largest network begun first; in this process for one job.
    jobs: processes, 0: one a core, at most 4."""
    jobs = workers(jobs)
    tasks = sorted(tasks, key=lambda task: -task.case.world_size * task.case.model.num_hidden_layers)
    if jobs == 1:
        for task in tasks:
            yield task.key, curve(task)
        return
    with pool(jobs) as processes:
        running = {processes.submit(curve, task): task.key for task in tasks}
        for done in as_completed(running):
            yield running[done], done.result()


def curve(task: Task) -> Curve:
    """Walk the lengths upwards; what does not fit, also with a budget INSISTENCE times as large, ends it: a
    longer context never needs less. Where the whole step does not fit, the smallest legal one is tried, and
    then at every longer length: from the second microbatch on accumulated gradients lie beside the
    activations, which the reach is not to depend on. What is best at one length is tried at the next, and
    then at the one before, with as many tokens a rank."""
    points: list[ContextPoint] = []
    tops: list[list[SimResult]] = []
    spent: list[Found] = []
    for seq_len in sorted(task.lengths):
        before = [result for top in tops[-2:] for result in top]
        whole, least = _batches(task, seq_len), _groups(task, seq_len)
        found = []
        if not points or not points[-1].small or min(whole) == least:
            found = _tried(task, seq_len, whole, before)
        if least < min(whole) and not any(one.point.fits for one in found):
            found += _tried(task, seq_len, [least], before, small=True)
        spent += found
        points.append(_best([one.point for one in found]))
        tops.append([result for one in found for result in one.top])
        if not points[-1].fits:
            break
    for place in reversed(range(len(points) - 1)):
        longer, seq_len = points[place + 1], points[place].seq_len
        results = [longer.result] if longer.fits and longer.result else []
        moved = [_moved(task, seq_len, min(_batches(task, seq_len)), results)]
        if points[place].small:
            moved.append(_moved(task, seq_len, _groups(task, seq_len), results, small=True))
        spent += moved
        points[place] = _best([points[place], *(one.point for one in moved)])
    return Curve(
        task.contender, points, sum(one.seconds for one in spent), sum(one.simulated for one in spent)
    )


def _tried(
    task: Task, seq_len: int, batches: Sequence[int], before: Sequence[SimResult], small: bool = False
) -> "list[Found]":
    """All that is searched at one length with steps of these sizes. What bounds rule out no budget brings
    back."""
    searched = list(_searches(task, seq_len, batches, small))
    found = [*searched, _moved(task, seq_len, min(batches), before, small)]
    if not any(one.point.fits for one in found) and any(one.promised for one in searched):
        found += _searches(replace(task, budget=INSISTENCE * task.budget), seq_len, batches, small)
    return found


@dataclass(frozen=True)
class Found:
    """What was found at one length. top: the best few that fit. promised: whether bounds left any."""

    point: ContextPoint
    top: Sequence[SimResult]
    simulated: int
    seconds: float
    promised: bool = True


def _moved(task: Task, seq_len: int, batch: int, results: Sequence[SimResult], small: bool = False) -> Found:
    """The best strategies of other lengths, as they are and with as many tokens a rank as there."""
    began, case = time.perf_counter(), task.case
    problem = case.problem(task.contender, seq_len, batch)
    training, most = problem.training, task.contender.most_split(problem)
    strategies = {
        one for result in results for one in _alike(result.strategy, seq_len / result.training.seq_len)
    }
    found: list[SimResult] = []
    for strategy in sorted(strategies, key=str) if case.accumulate else ():
        if strategy.dense.tensor_parallel * strategy.attention.context_parallel > most:
            continue
        try:
            found.append(simulate(case.model, case.hardware, case.nodes, strategy, training))
        except MopError:  # a degree that does not divide this length or batch
            continue
    point = _best(
        [ContextPoint(seq_len, batch, result, small=small) for result in found]
        or [ContextPoint(seq_len, batch, None, "none", small)]
    )
    top = [point.result] if point.fits and point.result else []
    return Found(point, top, len(found), time.perf_counter() - began)


def _alike(strategy: Strategy, times: float) -> Iterator[Strategy]:
    """A strategy for sequences `times` as long: itself; split over as many more ranks; in so much smaller
    microbatches."""
    yield strategy
    split, micro = strategy.attention.context_parallel * times, strategy.micro_batch / times
    change = msgspec.structs.replace
    ranks = strategy.dense.tensor_parallel * split
    if split >= 1 and split.is_integer() and strategy.world_size % ranks == 0:
        yield change(strategy, attention=change(strategy.attention, context_parallel=int(split)))
    if micro >= 1 and micro.is_integer():
        yield change(strategy, micro_batch=int(micro))


def nested(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """Curves of one case by contender, each with the best of itself and of the contenders whose rules are
    stricter: a search under a budget may miss in a large space what it finds in a part of it."""
    found = {}
    for name, own in curves.items():
        inside = [one for one in curves.values() if own.contender.contains(one.contender)]
        lengths = sorted({point.seq_len for one in inside for point in one.points})
        points: list[ContextPoint] = []
        for seq_len in lengths:
            points.append(_best([point for one in inside if (point := one.at(seq_len))]))
            if not points[-1].fits:
                break
        found[name] = replace(own, points=points)
    return found


def _best(points: Sequence[ContextPoint]) -> ContextPoint:
    """The fastest that is sure to fit, else the likeliest, of the whole step if that fits; else the one that
    misses by least."""
    fitting = [point for point in points if point.fits]
    if fitting:
        best = max(fitting, key=lambda one: (not one.small, one.assurance, one.throughput or 0.0))
        alike = [one for one in fitting if one.small == best.small and one.throughput]
        most = max((one.throughput or 0.0) * (1 + one.gap) for one in alike)
        return replace(best, gap=max(0.0, most / (best.throughput or most) - 1))
    missing = [point for point in points if point.result]
    return min(missing, key=lambda one: sum(one.result.missing_bytes) if one.result else 0, default=points[0])


def _searches(task: Task, seq_len: int, batches: Sequence[int], small: bool) -> Iterator[Found]:
    """A search for each global batch."""
    case = task.case
    once = small or not case.accumulate
    for batch in batches:
        axes = task.contender.at_once if once else task.contender.axes
        options = Options((task.contender.family,), TOP, task.budget, axes=axes)
        found = search(case.problem(task.contender, seq_len, batch), options)
        result = found.best or found.closest
        gap = found.gap if found.best and found.gap else 0.0
        point = ContextPoint(seq_len, batch, result, "" if result else found.verdict(), small, gap)
        yield Found(point, found.top, found.simulated, found.seconds, bool(found.played))


def _groups(task: Task, seq_len: int) -> int:
    """Groups of ranks that share a sequence, where they share it as far as they may: the smallest step."""
    case = task.case
    return case.world_size // task.contender.most_split(
        case.problem(task.contender, seq_len, case.world_size)
    )


def _batches(task: Task, seq_len: int) -> list[int]:
    """Sequences of a step: about `tokens_per_device`, as they divide over data groups.

    Without accumulation: one sequence for each group of ranks, for groups of every size.
    """
    case = task.case
    world, groups = case.world_size, _groups(task, seq_len)
    if not case.accumulate:
        return [count for count in range(groups, world + 1, groups) if world % count == 0]
    return [global_batch(world, case.tokens_per_device * world / seq_len, groups)]


def totals(curves: Iterable[Curve]) -> dict[str, Any]:
    """Simulations and seconds of searching, over all curves."""
    found = list(curves)
    return {
        "simulated": sum(one.simulated for one in found),
        "search_seconds": sum(one.seconds for one in found),
    }
