"""An FSDP2 job takes as long, and as much memory, whichever lowering plays it."""

import sys
from functools import cache
from typing import Any

import msgspec
import pytest

from mopsim.engine import SimResult, simulate
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stack import EAGER
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2
from tests.software import unfused

LOWER = sys.modules["mopsim.lowering.lower"]
replace = msgspec.structs.replace


def zero2(strategy: Strategy) -> Strategy:
    return replace(strategy, dense=replace(strategy.dense, zero=2))


CASES: dict[str, tuple[str, Strategy, int, int]] = {
    "recompute": ("qwen3_30b_a3b", fsdp2(16, experts=8), 4096, 64),
    "keep": ("qwen3_30b_a3b", fsdp2(16, experts=8, recompute="none"), 4096, 64),
    "chunked": ("qwen3_30b_a3b", fsdp2(16, experts=8, loss="chunked"), 4096, 64),
    "long": ("qwen3_30b_a3b", fsdp2(16, experts=8), 32768, 32),
    "experts whole": ("qwen3_30b_a3b", fsdp2(16), 4096, 64),
    "replicas": ("qwen3_30b_a3b", fsdp2(16, experts=8, dense_shard=8), 4096, 64),
    "not resharded": ("qwen3_30b_a3b", fsdp2(16, experts=8, reshard=False), 4096, 64),
    "zero 2": ("qwen3_30b_a3b", zero2(fsdp2(16, experts=8)), 4096, 64),
    "one microbatch": ("qwen3_30b_a3b", fsdp2(16, experts=8), 4096, 16),
    "host-bound": ("qwen3_30b_a3b", fsdp2(16, experts=8), 512, 64),
    "dense": ("llama3_8b", fsdp2(16), 4096, 64),
    "dense, keep": ("llama3_8b", fsdp2(16, recompute="none"), 4096, 64),
}


@cache
def own(case: str) -> SimResult:
    return played(case)


def played(case: str, **model: Any) -> SimResult:
    name, strategy, seq_len, batch = CASES[case]
    training = TrainSpec(seq_len=seq_len, global_batch=batch, routing="balanced")
    spec = replace(load_model(name), **model)
    return simulate(spec, load_profile("h200-sxm-141g"), 2, strategy, training)


@pytest.mark.parametrize("case", CASES)
def test_both_lowerings_agree(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = own(case)
    monkeypatch.setattr(LOWER, "_kind", lambda context: None)
    second = played(case)
    assert second.flops == first.flops
    assert second.step_time == pytest.approx(first.step_time, rel=0.02)
    assert second.peak_memory == pytest.approx(first.peak_memory, rel=0.04)
    for kind in ("all_gather", "reduce_scatter", "attention"):
        assert second.busy[kind] == pytest.approx(first.busy[kind], rel=0.001), kind
    for kind in ("matmul", "memory_bound"):  # one product or two for gate and up, rotations
        assert second.busy[kind] == pytest.approx(first.busy[kind], rel=0.12), kind


def test_a_field_of_the_model_that_changes_the_lowering_does_not_change_the_step() -> None:
    tied = played("recompute", tie_word_embeddings=True)
    assert tied.step_time == pytest.approx(own("recompute").step_time, rel=0.02)


def test_kernels_are_the_strategys_not_the_lowerings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told of kernels that fuse, an FSDP2 job is faster, and no longer what mopexec runs to the byte."""
    name, strategy, seq_len, batch = CASES["recompute"]
    training = TrainSpec(seq_len=seq_len, global_batch=batch, routing="balanced")
    assert load_stack(strategy.stack).unfused == EAGER
    fused = unfused("copies", sharding={"fsdp": True})
    quick = simulate(load_model(name), load_profile("h200-sxm-141g"), 2, strategy, training, fused)
    assert quick.step_time < 0.9 * own("recompute").step_time
