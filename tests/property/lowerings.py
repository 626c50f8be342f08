"""Strategies played through every lowering that accepts them. `python -m tests.property.lowerings` measures
the gaps again and writes `lowering_gaps.json`, of which no entry may grow."""

import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from mopsim.common.errors import SpecError
from mopsim.engine import SimResult, simulate
from mopsim.lowering.context import Context, make_context
from mopsim.spec.model import ModelSpec
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron, mop, zero_offload

LOWER = sys.modules["mopsim.lowering.lower"]
RECORD = Path(__file__).with_name("lowering_gaps.json")
replace = msgspec.structs.replace
Case = tuple[ModelSpec, Strategy, TrainSpec, int]
"""(model, strategy, training, nodes of eight devices)"""


def short(name: str, layers: int = 4) -> ModelSpec:
    """A preset with a few of its layers: what lowerings differ in is in every one."""
    model = load_model(name)
    return replace(model, num_hidden_layers=layers, first_k_dense_replace=min(model.first_k_dense_replace, 1))


def random_strategies(count: int, seed: int = 9) -> Iterator[tuple[str, Case]]:
    """`count` valid strategies of the families, by name; equal for equal seeds."""
    draw, found = random.Random(seed), 0
    models = {name: short(name) for name in ("qwen3_30b_a3b", "llama3_8b", "mop_120b")}
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
        world, sequence=draw.choice([1, 2]), experts=draw.choice([2, 8]) if moe else 1,
        vocabulary=draw.choice([2, 8]), chunk_tokens=draw.choice([0, 1024, 8192]),
        ffn_chunk_tokens=draw.choice([0, 1024]), loss_chunk_tokens=draw.choice([0, 1024]),
        state=draw.choice(["device", "host_streamed", "host"]),
        boundary_tier=draw.choice(["device", "host"]), dense_shard=draw.choice([0, 8]),
    )  # fmt: skip


def _zero(draw: random.Random, world: int, moe: bool) -> Strategy:
    return zero_offload(
        world, sequence=draw.choice([1, 2]), experts=draw.choice([2, 8]) if moe else 1,
        loss=draw.choice(["full", "chunked"]), boundary_tier=draw.choice(["device", "host"]),
    )  # fmt: skip


def _fsdp(draw: random.Random, world: int, moe: bool) -> Strategy:
    return fsdp2(
        world, sequence=draw.choice([1, 2]), experts=draw.choice([1, 8]) if moe else 1,
        recompute=draw.choice(["none", "full"]), loss=draw.choice(["full", "chunked"]),
        offload=draw.choice([False, False, True]), reshard=draw.choice([True, True, False]),
        dense_shard=draw.choice([0, 8]), prefetch=draw.choice([0, 1, 2]),
    )  # fmt: skip


def _megatron(draw: random.Random, world: int, moe: bool) -> Strategy:
    return megatron(
        world, tensor=draw.choice([1, 2]), pipeline=draw.choice([1, 2]), sequence=draw.choice([1, 2]),
        experts=draw.choice([1, 4]) if moe else 1,
        recompute=draw.choice(["none", "selective", "full"]),  # type: ignore[arg-type]
    )  # fmt: skip


_FAMILIES: dict[str, Callable[[random.Random, int, bool], Strategy]] = {
    "mop": _mop, "zero_offload": _zero, "fsdp2": _fsdp, "megatron": _megatron,
}  # fmt: skip


def play(case: Case) -> SimResult:
    model, strategy, training, nodes = case
    return simulate(model, load_profile("h200-sxm-141g"), nodes, strategy, training)


@contextmanager
def forced(kind: object) -> Iterator[None]:
    before = LOWER._kind
    LOWER._kind = lambda context: kind
    try:
        yield
    finally:
        LOWER._kind = before


def others(case: Case) -> dict[str, object]:
    """Lowerings beside the chosen one that take the case: the staged one where it does not refuse; `tapes`
    wherever `flat` does."""
    context: Context = make_context(*case[:3], 8)
    chosen = LOWER._kind(context)
    found: dict[str, object] = {}
    if chosen is not None:
        found["staged"] = None
    if chosen is getattr(LOWER, "FlatStep", None) and hasattr(LOWER, "Step"):
        found["tapes"] = LOWER.Step
    return found


def gaps(case: Case) -> dict[str, tuple[float, float]]:
    """(time, peak) of each other lowering over the chosen one's, less one, in per cent."""
    first, found = play(case), {}
    for name, kind in others(case).items():
        try:
            with forced(kind):
                second = play(case)
        except SpecError:
            continue
        found[name] = (
            round(100 * (second.step_time / first.step_time - 1), 2),
            round(100 * (second.peak_memory / first.peak_memory - 1), 2),
        )
    return found


def zero2(strategy: Strategy) -> Strategy:
    return replace(strategy, dense=replace(strategy.dense, zero=2))


def fixed() -> Iterator[tuple[str, Case]]:
    """FSDP2's mechanisms, one at a time."""
    cases: dict[str, tuple[str, Strategy, int, int]] = {
        "recompute": ("qwen3_30b_a3b", fsdp2(16, experts=8), 4096, 64),
        "keep": ("qwen3_30b_a3b", fsdp2(16, experts=8, recompute="none"), 4096, 64),
        "chunked": ("qwen3_30b_a3b", fsdp2(16, experts=8, loss="chunked"), 4096, 64),
        "long": ("qwen3_30b_a3b", fsdp2(16, experts=8), 32768, 32),
        "experts whole": ("qwen3_30b_a3b", fsdp2(16), 4096, 64),
        "replicas": ("qwen3_30b_a3b", fsdp2(16, experts=8, dense_shard=8), 4096, 64),
        "not resharded": ("qwen3_30b_a3b", fsdp2(16, experts=8, reshard=False), 4096, 64),
        "offloaded": ("qwen3_30b_a3b", fsdp2(16, experts=8, offload=True), 4096, 64),
        "zero 2": ("qwen3_30b_a3b", zero2(fsdp2(16, experts=8)), 4096, 64),
        "host-bound": ("qwen3_30b_a3b", fsdp2(16, experts=8), 512, 64),
        "dense": ("llama3_8b", fsdp2(16), 4096, 64),
        "dense, keep": ("llama3_8b", fsdp2(16, recompute="none"), 4096, 64),
    }
    for name, (model, strategy, length, batch) in cases.items():
        yield (
            f"fixed {name}",
            (short(model), strategy, TrainSpec(seq_len=length, global_batch=batch, routing="balanced"), 2),
        )


def every_case() -> dict[str, Case]:
    return dict([*fixed(), *random_strategies(28)])


def main() -> None:
    """Write the record."""
    found: dict[str, Any] = {name: gaps(case) for name, case in every_case().items()}
    found = {name: entry for name, entry in found.items() if entry}
    RECORD.write_text(json.dumps(found, indent=1) + "\n")
    for name, entry in found.items():
        print(name, entry)


if __name__ == "__main__":
    main()
