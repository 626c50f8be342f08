"""What a token takes in a layer at least: bytes kept for its backward, by the pieces of a reference row, and
traffic, by the layer's tapes."""

from dataclasses import dataclass

import numpy as np

from mopsim.graph.attention import attention
from mopsim.graph.experts import experts
from mopsim.graph.shapes import Shapes
from mopsim.graph.tape import Tape
from mopsim.search.pieces import Pieces
from mopsim.search.problem import LEANEST, Column, Problem
from mopsim.search.space import Space
from mopsim.search.wires import Reals


@dataclass(frozen=True)
class Layer:
    """Bytes of a token in a layer.

    kept: left for the backward beside the layer's input, by what is recomputed (`recomputed`); height: the
    most that its backward takes above its start. Both 0 under a runtime that recomputes every layer and frees
    as it goes. Traffic: read and written, forward and backward, by kernels that are no products.
    """

    kept: Reals
    height: Reals
    attention_traffic: float
    experts_traffic: float

    @staticmethod
    def of(space: Space, each: float) -> "Layer":
        """each: bytes of an element."""
        problem = space.problem
        kept, height = _kept(space, each)
        fused = not space.stack.sharding.fsdp
        return Layer(kept, height, *_moved(problem, int(each), fused))


def recomputed(recompute: Column, modules: Column) -> Column:
    """Places in `Layer.kept` and `Layer.height`: all is recomputed, or modules of a code."""
    return np.where(recompute == 1, 0, 1 + modules)


def _kept(space: Space, each: float) -> tuple[Reals, Reals]:
    """By the less of two rows whose layers and sequences are split least: one's shares of what is exchanged
    are least, the other's experts, whose gradients are a part of the height."""
    c = space.columns
    found = []
    for split in (c["experts"], -c["experts"]):
        order = np.lexsort((-c["micro_batch"], c["tensor"], c["sequence"], split, c["expert_tensor"]))
        row = space.take(order[:1]).having(
            virtual_stages=1, layout=0, boundary_host=0, dispatcher=0, overlap=0, recompute=1, modules=0
        )
        key = ("kept", space.family, *row.row(0).values())
        if key not in space.problem.known:
            space.problem.known[key] = _by_recomputation(row, each)
        found.append(space.problem.known[key])
    (kept, height), (_, lower) = found
    return kept, np.minimum(height, lower) if lower.any() else height


def _by_recomputation(row: Space, each: float) -> tuple[Reals, Reals]:
    kept, height = np.zeros(LEANEST + 2), np.zeros(LEANEST + 2)
    if row.stack.explicit:
        return kept, height
    tokens = float(row.tokens()[0] / row.columns["tensor"][0])
    hidden = row.problem.model.hidden_size * each
    made = []
    for code in range(LEANEST + 1):
        again = {"recompute": 1} if code == 0 else {"recompute": 0, "modules": code - 1}
        layers = Pieces(row.having(**again)).layers(0)
        if layers:
            made.append(code)
            kept[code] = max(0.0, min(one.left for one in layers.values()) / tokens - hidden)
            height[code] = max(0.0, min(one.height for one in layers.values()) / tokens)
    chosen = made[1:] or [0]
    kept[-1], height[-1] = kept[chosen].min(), height[chosen].min()
    return kept, height


def _moved(problem: Problem, each: int, fused: bool) -> tuple[float, float]:
    """fused: of kernels that do several things at once."""
    model, rows = problem.model, problem.training.seq_len
    shapes = Shapes(rows, rows, width=each, fused=fused)
    moved, through = (
        min(_traffic(attention(model, shapes, layer)) for layer in range(model.num_hidden_layers)),
        0.0,
    )
    if model.num_local_experts:
        through = _traffic(experts(model, (rows * model.num_experts_per_tok,), each, fused=fused))
    return moved / rows, through / rows


def _traffic(tape: Tape) -> float:
    """Bytes of a forward and a backward through kernels that only move memory."""
    found = 0.0
    for kernel in tape.kernels:
        if kernel.kind == "memory_bound":
            found += kernel.bytes + (kernel.bytes if kernel.back_bytes is None else kernel.back_bytes)
    return found
