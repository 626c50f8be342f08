"""What a user may rule out, and the best plan of a family that keeps to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mopsim.engine import SimResult
from mopsim.search.hunt import LEEWAY, Hunt
from mopsim.search.pool import Pool
from mopsim.search.problem import DEVICE
from mopsim.search.result import SearchResult
from mopsim.spec.capability import runnable
from mopsim.spec.model import ModelSpec

TRIES = 3
"""Simulations at most of a family for each restriction that its best does not keep."""


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


def try_restricted(hunt: Hunt, progress: Callable[[SearchResult], None]) -> None:
    """Simulate, of each restriction that the best of the family does not keep, what keeps it and is expected
    to be fastest, until it is slower than one that was simulated, or the budget of the family is spent."""
    model, takes = hunt.found.model, hunt.options.takes
    for one in RESTRICTIONS.values():
        best = hunt.found.best
        if best is None or not one.columns or one.kept(best, model):
            continue
        may = _may(hunt.pool, one)
        for _ in range(TRIES):
            known = [
                done.step_time
                for done in hunt.found.played
                if done.sure and takes(done) and one.kept(done, model)
            ]
            if hunt.found.simulated >= hunt.options.budget:
                return
            position = hunt.fastest(may)
            if position is None or hunt.pool.one(position).seconds * (1 + LEEWAY) > min(
                known, default=np.inf
            ):
                break
            hunt.simulate(hunt.pool, position, progress)


def _may(pool: Pool, one: Restriction) -> NDArray[np.bool_]:
    """Which candidates keep a restriction."""
    columns = pool.space.columns
    kept = [columns[name][pool.rows] == value for name, value in one.columns.items()]
    found: NDArray[np.bool_] = np.logical_and.reduce(kept)
    return found
