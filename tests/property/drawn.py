"""Strategies drawn from the families, and how they are played."""

import random
from collections.abc import Callable, Iterator

import msgspec

from mopsim.common.errors import SpecError
from mopsim.engine import SimResult, simulate
from mopsim.program.context import make_context
from mopsim.spec.layer_fields import dense_fields, window_fields
from mopsim.spec.model import ModelSpec
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron, mop, zero_offload

replace = msgspec.structs.replace
Case = tuple[ModelSpec, Strategy, TrainSpec, int]
"""(model, strategy, training, nodes of eight devices)"""


def short(name: str, layers: int = 4) -> ModelSpec:
    """A preset with a few of its layers: every mechanism is in each."""
    model = load_model(name)
    leading = min(model.first_k_dense_replace, 1)
    return replace(model, **{**model.cut(layers), "first_k_dense_replace": leading})


def mixed(layers: int = 6) -> ModelSpec:
    """Dense and MoE layers in turn, windows in two layers of three."""
    windows = window_fields([layer % 3 > 0 for layer in range(layers)], 1024)
    dense = dense_fields(range(0, layers, 2), layers)
    return replace(
        load_model("qwen3_30b_a3b"), name="mixed", num_hidden_layers=layers, intermediate_size=6144,
        total_params=None, active_params=None, **dense, **windows,
    )  # fmt: skip


def random_strategies(count: int, seed: int = 9) -> Iterator[tuple[str, Case]]:
    """`count` valid strategies of the families, by name; equal for equal seeds."""
    draw, found = random.Random(seed), 0
    models = {name: short(name) for name in ("qwen3_30b_a3b", "llama3_8b", "mop_120b")} | {"mixed": mixed()}
    while found < count:
        family, name = draw.choice(list(_FAMILIES)), draw.choice(list(models))
        nodes, length = draw.choice([1, 2]), draw.choice([2048, 4096, 16384])
        try:
            strategy = _FAMILIES[family](draw, 8 * nodes, bool(models[name].num_local_experts))
            training = TrainSpec(
                seq_len=length, global_batch=strategy.data_groups * strategy.micro_batch * draw.choice([1, 4])
            )
            make_context(models[name], strategy, training, 8)
        except SpecError:
            continue
        found += 1
        yield f"{found} {family} {name}", (models[name], strategy, training, nodes)


def _mop(draw: random.Random, world: int, moe: bool) -> Strategy:
    return mop(
        world, context_parallel=draw.choice([1, 2]), expert_parallel=draw.choice([2, 8]) if moe else 1,
        vocab_parallel=draw.choice([2, 8]), expert_chunk_tokens=draw.choice([0, 1024, 8192]),
        ffn_chunk_tokens=draw.choice([0, 1024]), loss_chunk_tokens=draw.choice([0, 1024]),
        optimizer=draw.choice(["device", "host_streamed", "host"]),
        offload_inputs=draw.choice([False, True]), fsdp=draw.choice([0, 8]),
    )  # fmt: skip


def _zero(draw: random.Random, world: int, moe: bool) -> Strategy:
    return zero_offload(
        world, context_parallel=draw.choice([1, 2]), expert_parallel=draw.choice([2, 8]) if moe else 1,
        loss=draw.choice(["full", "chunked"]), offload_inputs=draw.choice([False, True]),
    )  # fmt: skip


def _fsdp(draw: random.Random, world: int, moe: bool) -> Strategy:
    return fsdp2(
        world, context_parallel=draw.choice([1, 2]), expert_parallel=draw.choice([1, 8]) if moe else 1,
        recompute=draw.choice(["none", "full"]), loss=draw.choice(["full", "chunked"]),
        offload=draw.choice([False, False, True]), reshard_after_forward=draw.choice([True, True, False]),
        fsdp=draw.choice([0, 8]), prefetch=draw.choice([0, 1, 2]),
    )  # fmt: skip


def _megatron(draw: random.Random, world: int, moe: bool) -> Strategy:
    return megatron(
        world, tensor_parallel=draw.choice([1, 2]), pipeline_parallel=draw.choice([1, 2]),
        context_parallel=draw.choice([1, 2]),
        expert_parallel=draw.choice([1, 4]) if moe else 1,
        recompute=draw.choice(["none", "selective", "full"]),  # type: ignore[arg-type]
    )  # fmt: skip


_FAMILIES: dict[str, Callable[[random.Random, int, bool], Strategy]] = {
    "mop": _mop, "zero_offload": _zero, "fsdp2": _fsdp, "megatron": _megatron,
}  # fmt: skip


def play(case: Case) -> SimResult:
    model, strategy, training, nodes = case
    return simulate(model, load_profile("h200-sxm-141g"), nodes, strategy, training)
