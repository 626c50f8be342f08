"""Where nothing fits: the nearest miss, and the smallest changes that would make a plan fit."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from msgspec.structs import replace as changed

from mopsim.common.errors import MopError
from mopsim.common.units import format_bytes
from mopsim.cost.compute import matmul_curve
from mopsim.engine import SimResult
from mopsim.search.driver import search
from mopsim.search.options import Options
from mopsim.search.problem import Problem
from mopsim.search.result import SearchResult
from mopsim.search.staged import may_fit
from mopsim.spec.strategy import MatmulDType

TRIES = 4
"""Simulations of each family that a change gets."""
DOUBLINGS = 6
"""How often nodes are doubled, or the sequence halved, at most."""
NARROWER: dict[str, tuple[MatmulDType, ...]] = {
    "float64": ("float32", "bfloat16"), "float32": ("bfloat16",), "bfloat16": ("mxfp8", "fp8"),
}  # fmt: skip

Change = tuple[str, Problem]
Progress = Callable[[int, str], None]


def nearest_miss(one: SimResult) -> str:
    """What the closest plan misses, by how much, and the plan."""
    most = f", most of it {one.over}"
    tiers = ("device", most, one.memory_limit), ("host", "", one.host_limit)
    over = [
        f"{format_bytes(size)} over the {where} memory of a rank "
        f"({size / max(limit, 1):.0%} more would do{what})"
        for size, (where, what, limit) in zip(one.missing_bytes, tiers, strict=True)
        if size
    ]
    return f"the nearest miss is {' and '.join(over)}: {one.line}"


def would_fit(
    found: SearchResult, problem: Problem, options: Options, progress: Progress = lambda simulated, said: None
) -> list[str]:
    """A line each: what is missed and by how much; of each kind of change the smallest that a short search
    finds a plan for. progress: called as progress(simulated so far, the change that is tried)."""
    tried = 0
    lines = [] if found.closest is None else [nearest_miss(found.closest)]
    kinds = (_nodes(problem), _lengths(problem), _bits(problem), _hosts(found, problem))
    for kind in kinds:
        for said, other in kind:
            progress(tried, said)
            short = _short(other, options)
            one = search(other, short) if short.families else SearchResult(other.model)
            tried += one.simulated
            progress(tried, said)
            best = one.best
            if best is not None and options.takes(best):
                lines.append(f"{said} would fit: {best.line}")
                break
    if len(lines) == (found.closest is not None):
        lines.append("we found no single change of nodes, sequence, bits or host memory that would fit")
    return lines


def _short(problem: Problem, options: Options) -> Options:
    """Of a search that asks only whether something fits, of those families whose bounds leave that open. It
    is over before another process has started."""
    families = tuple(family for family in options.families if may_fit(problem, family))
    return replace(options, families=families, top=1, budget=TRIES, prove=False, nearest=False, jobs=1)


def _nodes(problem: Problem) -> Iterator[Change]:
    for doubled in range(1, DOUBLINGS + 1):
        nodes = problem.num_nodes << doubled
        yield f"{nodes} nodes instead of {problem.num_nodes}", replace(problem, num_nodes=nodes)


def _lengths(problem: Problem) -> Iterator[Change]:
    whole = problem.training.seq_len
    for halved in range(1, DOUBLINGS + 1):
        length = whole >> halved
        if length >= 512 and whole % (1 << halved) == 0:
            training = problem.training.at_length(length)
            yield f"sequences of {length:,} tokens instead of {whole:,}", replace(problem, training=training)


def _bits(problem: Problem) -> Iterator[Change]:
    for precision in NARROWER.get(problem.precision, ()):
        try:
            matmul_curve(problem.hardware, precision)
        except MopError:
            continue
        yield f"{precision} instead of {problem.precision}", replace(problem, precision=precision)


def _hosts(found: SearchResult, problem: Problem) -> Iterator[Change]:
    """A larger host, where a plan was seen that misses nothing else."""
    if not any(one.over == "host" for one in found.played):
        return
    host = problem.hardware.host
    for times in (2, 4):
        memory = changed(host.memory, value=host.memory.value * times)
        hardware = changed(problem.hardware, host=changed(host, memory=memory))
        yield f"{format_bytes(memory.si)} of host memory a node", replace(problem, hardware=hardware)
