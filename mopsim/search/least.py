"""The step time of one strategy, at least: the bound of the row of a space that it is."""

from functools import cache

import numpy as np

from mopsim.common.errors import MopError
from mopsim.search.axes import every_axis, followed
from mopsim.search.build import Row, build
from mopsim.search.facts import SpaceFacts
from mopsim.search.pieces import Pieces
from mopsim.search.problem import (
    DEFAULTS,
    DEVICE,
    DISPATCHERS,
    EXCHANGES,
    HOST,
    PARTS,
    RECOMPUTED,
    SAVED,
    Problem,
)
from mopsim.search.refined import Refined
from mopsim.search.space import Space
from mopsim.search.stages import BALANCED, IDEAL, WEIGHTED, WEIGHTS, layers_of
from mopsim.spec.categories import FAMILIES
from mopsim.spec.model import ModelSpec
from mopsim.spec.strategy import Strategy


def least_time(problem: Problem, strategy: Strategy) -> float:
    """Seconds of a step of a strategy, as its stack resolves it; 0 where no row is known to be this
    strategy."""
    row = _row(problem, strategy)
    if row is None:
        return 0.0
    columns = {name: np.array([value], dtype=np.int64) for name, value in row.items()}
    space = Space(strategy.name, problem, columns)
    closer, _ = Refined.of(Pieces(space), SpaceFacts.of(space), [np.zeros(1, dtype=np.int64)])
    return float(closer.time()[0]) if closer else 0.0


def _row(problem: Problem, s: Strategy) -> Row | None:
    """The row that builds a strategy; None where there is none, or another than is looked for here."""
    stages, virtual = s.pipeline.pipeline_parallel, s.pipeline.virtual_stages
    layout, modules = _layout(problem.model, stages, virtual, s.pipeline.layers), s.activations.modules
    dispatcher = s.experts.token_dispatcher
    saved = s.activations.save_ops
    known = modules in RECOMPUTED and saved in SAVED and dispatcher in DISPATCHERS
    if s.name not in FAMILIES or layout is None or not known:
        return None
    fixed = {
        name: value
        for name, values in every_axis(problem, s.name).items()
        if isinstance(name, str) and len(values) == 1 and isinstance(value := values[0], int)
    }
    away = s.optimizer.update_on == "host"
    row: Row = {
        **DEFAULTS, **fixed,
        "micro_batch": s.micro_batch, "tensor": s.dense.tensor_parallel, "pipeline": stages,
        "virtual_stages": virtual, "layout": layout, "sequence": s.attention.context_parallel,
        "exchange": EXCHANGES.index(s.attention.cp_comm_type), "experts": s.experts.expert_parallel,
        "expert_tensor": s.experts.expert_tensor_parallel,
        "dispatcher": DISPATCHERS.index(dispatcher),
        "recompute": int(s.activations.recompute == "full"), "modules": RECOMPUTED.index(modules),
        "saved": SAVED.index(saved),
        "boundary_host": int(s.activations.layer_inputs == "host"),
        "state": HOST if away else DEVICE, "state_parts": round(PARTS * s.optimizer.host_fraction),
        "overlap": int(bool(s.overlap.experts)),
    }  # fmt: skip
    row = {name: int(value) for name, value in followed(problem, s.name, row).items()}
    try:
        return row if build(s.name, problem, row) == s else None
    except MopError:
        return None


@cache
def _layout(model: ModelSpec, stages: int, virtual: int, layers: tuple[int, ...]) -> int | None:
    """The code of the layers of each part of a pipeline; empty: as even as can be."""
    for code in range(WEIGHTED + len(WEIGHTS)):
        if code not in (IDEAL, BALANCED) and layers_of(model, stages, virtual, code) == layers:
            return code
    return None
