"""What a user may rule out, and the best plans that keep to it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mopsim.engine import SimResult
from mopsim.search.hunt import LEEWAY, Hunt
from mopsim.search.options import Options
from mopsim.search.pool import Pool
from mopsim.search.problem import DEVICE, Problem
from mopsim.search.result import SearchResult
from mopsim.search.simulating import rank, run
from mopsim.spec.capability import runnable
from mopsim.spec.model import ModelSpec
from mopsim.spec.stack import Stack

TRIES = 3
"""Candidates of a family that may be simulated for each restriction that its best does not keep."""


RUN = "only plans that mopexec runs"


@dataclass(frozen=True)
class Restriction:
    """A rule that plans of a model keep or not. columns: the values of a space's columns that keep it."""

    kept: Callable[[SimResult, ModelSpec], bool]
    columns: Mapping[str, int] = field(default_factory=dict)


RESTRICTIONS = {
    RUN: Restriction(lambda one, model: runnable(one.strategy, model, one.training, one.stack) is None),
    "nothing on the host": Restriction(
        lambda one, model: one.host_memory == 0, {"state": DEVICE, "boundary_host": 0, "offload": 0}
    ),
    "no recomputation": Restriction(
        lambda one, model: one.strategy.activations.recompute == "none", {"recompute": 0, "modules": 0}
    ),
    "no pipeline": Restriction(
        lambda one, model: one.strategy.pipeline.pipeline_parallel == 1, {"pipeline": 1}
    ),
    "no tensor parallelism": Restriction(
        lambda one, model: one.strategy.dense.tensor_parallel == 1, {"tensor": 1}
    ),
}


@dataclass(frozen=True)
class Spare:
    """A candidate that keeps rules which the best of its family does not. rules: their names; row: its
    columns; stack: its software; bound, seconds: its step time, at least and expected."""

    rules: frozenset[str]
    row: dict[str, int]
    stack: Stack
    bound: float
    seconds: float


def spares(hunt: Hunt) -> list[Spare]:
    """Of each restriction that the best of the family does not keep, up to TRIES that do and are expected to
    be faster than what was simulated and does."""
    found, pool, chosen = hunt.found, hunt.pool, list[int]()
    if found.best is None:
        return []
    rules = {
        name: _may(pool, one)
        for name, one in RESTRICTIONS.items()
        if one.columns and not one.kept(found.best, found.model)
    }
    for name, may in rules.items():
        left, known = may.copy(), _known([found], RESTRICTIONS[name], hunt.options)
        for _ in range(TRIES):
            position = hunt.fastest(left)
            if position is None or pool.one(position).seconds * (1 + LEEWAY) > known:
                break
            left[position] = False
            chosen.append(position)
    return [
        Spare(
            frozenset(name for name, may in rules.items() if may[position]),
            pool.space.row(int(pool.rows[position])), pool.space.stack,
            float(pool.time[position]), pool.one(position).seconds,
        )
        for position in dict.fromkeys(chosen)
    ]  # fmt: skip


def try_restricted(
    best: SimResult,
    families: Mapping[str, tuple[SearchResult, Sequence[Spare]]],
    problem: Problem,
    options: Options,
    progress: Callable[[SearchResult], None],
) -> list[tuple[str, Spare]]:
    """Simulate, of each restriction that the best of all families does not keep, what is expected to be
    faster than all that was simulated and does; of the family of the best, than what is of that family. A
    family keeps its budget. Returns what was tried."""
    tried: list[tuple[str, Spare]] = []
    for name, rule in RESTRICTIONS.items():
        if rule.kept(best, problem.model):
            continue
        keep = [(family, one) for family, (_, some) in families.items() for one in some if name in one.rules]
        for family, one in sorted(keep, key=lambda pair: pair[1].seconds):
            found, own = families[family][0], family == best.strategy.name
            rivals = [found] if own else [other for other, _ in families.values()]
            slow = one.seconds * (1 + LEEWAY) > _known(rivals, rule, options)
            if slow or (family, one) in tried or found.simulated >= options.budget:
                continue
            tried.append((family, one))
            simulated = run(problem, family, one.row, one.stack, found)
            if simulated is not None:
                found.played.append(simulated)
                rank(simulated, found, options, problem)
                progress(found)
    return tried


def _known(every: Sequence[SearchResult], rule: Restriction, options: Options) -> float:
    """Seconds of the fastest plan that was simulated, is taken and keeps a rule; infinite without one."""
    return min(
        (
            one.step_time
            for found in every
            for one in found.played
            if one.sure and options.takes(one) and rule.kept(one, found.model)
        ),
        default=np.inf,
    )


def _may(pool: Pool, one: Restriction) -> NDArray[np.bool_]:
    """Which candidates keep a restriction."""
    columns = pool.space.columns
    kept = [columns[name][pool.rows] == value for name, value in one.columns.items()]
    found: NDArray[np.bool_] = np.logical_and.reduce(kept)
    return found
