"""A flat runner's training state by parameter, as `mopexec.run.shards` has it for every runtime."""

import math
from typing import Any

import torch
from torch import Tensor

from mopexec.flat.units import Unit
from mopexec.measure.scope import uncounted
from mopexec.operators.optimizer import FlatAdamW
from mopexec.run.shards import STEP, FlatShards, Piece
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


def by_parameter(unit: Unit, flat: Tensor) -> dict[str, FlatShards]:
    """What a buffer laid out as the unit's shard holds of each parameter."""
    pieces: dict[str, list[Piece]] = {name: [] for name, _ in unit.contents.names}
    for part in unit.parts():
        start = (part.index or 0) * math.prod(part.shape) + part.start
        pieces[part.name].append(Piece(start, flat[part.place : part.place + part.numel]))
    experts = unit.contents.total_stack
    stack = (experts,) if experts else ()
    return {name: FlatShards.of(pieces[name], (*stack, *shape), flat) for name, shape in unit.contents.names}
