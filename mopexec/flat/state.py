"""A flat runner's training state by parameter, as `mopexec.run.shards` has it for every runtime."""

import math
from typing import Any

import torch
from torch import Tensor

from mopexec.flat.units import Unit
from mopexec.measure.scope import uncounted
from mopexec.operators.optimizer import FlatAdamW
from mopexec.run.shards import STEP, ParameterPieces, Piece, boxes
from mopexec.weights.source import Source

ROUTER = "router.weight"


def initialize(optimizer: FlatAdamW[Unit], source: Source) -> None:
    """Weights of the source: masters in their own dtype where there are any, of which the parameters are then
    the rounded ones.
    """
    for unit, state in zip(optimizer.units, optimizer.states, strict=True):
        with uncounted():
            unit.fill(unit.params if state.master is None else state.master, source)
    _follow_masters(optimizer)


def state_dict(optimizer: FlatAdamW[Unit], balance_bias: Tensor) -> dict[str, Any]:
    """Values and moments by parameter, sharing the live memory; the routers' biases [MoE layers, E] by
    router.
    """
    optimizer.finish()
    optimizer.platform.synchronize()
    found: dict[str, Any] = {STEP: torch.tensor(optimizer.step_number)}
    for unit, state in zip(optimizer.units, optimizer.states, strict=True):
        value = unit.params if state.master is None else state.master
        kinds = {"value": value, "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
        for kind, flat in kinds.items():
            found |= {f"{name}.{kind}": shards for name, shards in by_parameter(unit, flat).items()}
    routers = [name for unit in optimizer.units for name, _ in unit.contents.names if name.endswith(ROUTER)]
    for row, name in enumerate(routers):
        found[f"{name.removesuffix('weight')}balance_bias"] = balance_bias[row]
    return found


def load_state_dict(optimizer: FlatAdamW[Unit], state: dict[str, Any]) -> None:
    """Take what loading did not fill in place: the step count, and the parameters of their master weights."""
    optimizer.finish()
    optimizer.step_number = int(state[STEP])
    _follow_masters(optimizer)


def _follow_masters(optimizer: FlatAdamW[Unit]) -> None:
    for unit, kept in zip(optimizer.units, optimizer.states, strict=True):
        if kept.master is not None:
            optimizer.platform.copy(unit.params, kept.master)
    optimizer.platform.synchronize()


def by_parameter(unit: Unit, flat: Tensor) -> dict[str, ParameterPieces]:
    """What a buffer laid out as the unit's shard holds of each parameter: of those of experts, which lie
    expert by expert, columns of several at once."""
    contents = unit.contents
    stack = (contents.total_stack,) if contents.stack else ()
    pieces: dict[str, list[Piece]] = {name: [] for name, _ in contents.names}
    order = (contents.stack or 1, contents.per_copy)
    for box in boxes(flat[: unit.valid], unit.first, order, (contents.first, 0)):
        (copy, first), (copies, width), end = box.first, box.values.shape, 0
        for name, shape in contents.names:
            begin, end = end, end + math.prod(shape)
            low, high = max(first, begin), min(first + width, end)
            if low >= high:
                continue
            mine, origin = box.values[:, low - first : high - first], (copy,) * len(stack) + (0,) * len(shape)
            if copies > 1:
                pieces[name].append(Piece(origin, mine.view(copies, *shape)))
            else:
                pieces[name] += boxes(mine[0], low - begin, (*stack, *shape), origin)
    wholes = {name: (*stack, *shape) for name, shape in contents.names}
    return {name: ParameterPieces.of(pieces[name], whole, flat) for name, whole in wholes.items()}
