"""Layers that are composed take the time, and to the byte the memory, of layers that are all played."""

import random

import pytest
from msgspec import structs

from mopsim.engine import SimResult, run
from mopsim.program import lower
from mopsim.program.composed import compose
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron, mop, zero_offload
from tests.property.drawn import mixed
from tests.software import changed

MODELS = {
    **{
        name: load_model(name)
        for name in ("qwen3_30b_a3b", "gpt_oss_120b", "deepseek_v3", "llama3_8b", "mop_1t")
    },
    "mixed": mixed(48),
}


def drawn(seed: int) -> tuple[str, Strategy, int]:
    """A network, a strategy on 16 ranks and a sequence length."""
    rng = random.Random(seed)
    name, two = rng.choice(list(MODELS)), rng.choice((1, 2))
    experts = 1 if name == "llama3_8b" else rng.choice((1, 4, 8, 16))
    seq_len = rng.choice((1024, 4096, 16384))
    found = (
        mop(
            16, context_parallel=two, expert_parallel=experts, vocab_parallel=rng.choice((1, 8)),
            expert_chunk_tokens=rng.choice((1024, 8192)),
            offload_inputs=rng.choice((False, True)), offload_inputs_bytes=rng.choice((0, 2**30)),
            optimizer=rng.choice(("device", "host_streamed", "host")),
        ),
        fsdp2(
            16, expert_parallel=experts, recompute=rng.choice(("none", "full")), loss=rng.choice(("full",
            "chunked")),
            offload=rng.random() < 0.3, tensor_parallel=two,
        ),
        megatron(
            16, tensor_parallel=two, expert_parallel=max(1, experts // two),
            recompute=rng.choice(("none", "selective", "full")),
        ),
        zero_offload(16, expert_parallel=experts),
    )  # fmt: skip
    return name, rng.choice(found), seq_len


def both(
    name: str,
    strategy: Strategy,
    seq_len: int,
    card: str = "h200-sxm-141g",
    batch: int = 64,
    queues: str | None = None,
) -> tuple[SimResult, SimResult]:
    model, hardware = MODELS[name], load_profile(card)
    training = TrainSpec(seq_len=seq_len, global_batch=batch)
    found, stack = [], changed(strategy.stack, host={"queues": {"default": queues}}) if queues else None
    for play in (True, False):
        workload = lower(model, strategy, training, hardware.scale_up_size, stack, compose=play)
        found.append(run(workload, model, hardware, strategy, training))
    return found[0], found[1]


@pytest.mark.parametrize("seed", range(4))
def test_composed_layers_queue_as_those_that_are_played(seed: int) -> None:
    short, whole = both(*drawn(seed), queues="one")
    assert short.step_time == pytest.approx(whole.step_time, rel=1e-3)
    assert short.peak_memory == whole.peak_memory


@pytest.mark.parametrize("seed", range(30))
def test_composed_layers_are_those_that_are_played(seed: int) -> None:
    short, whole = both(*drawn(seed))
    assert short.step_time == pytest.approx(whole.step_time, rel=1e-3)
    assert short.peak_memory == whole.peak_memory
    assert short.memory_by_category == whole.memory_by_category
    assert short.host_memory == whole.host_memory
    assert short.host_by_category == whole.host_by_category
    assert short.flops == pytest.approx(whole.flops, rel=1e-12)
    assert short.num_ops == whole.num_ops
    assert short.peak_time == pytest.approx(whole.peak_time, rel=1e-2, abs=1e-3 * whole.step_time)
    for kind, seconds in whole.busy.items():
        assert short.busy[kind] == pytest.approx(seconds, rel=1e-9), kind
    for kind, seconds in whole.exposed.items():
        assert short.exposed.get(kind, 0.0) == pytest.approx(seconds, abs=2e-3 * whole.step_time), kind


@pytest.mark.parametrize(("card", "seq_len"), [("a100-sxm-80g", 4096), ("h100-sxm-80g", 4864)])
def test_what_earlier_layers_left_a_stream_is_not_held_over_a_gap(card: str, seq_len: int) -> None:
    """Copies down of the first layers are still on their way while layers that copy nothing run."""
    strategy = megatron(8, recompute="none")
    away = structs.replace(strategy.activations, cpu_offload_layers=8)
    strategy = structs.replace(strategy, activations=away)
    short, whole = both("llama3_8b", strategy, seq_len, card, batch=8)
    assert short.step_time == pytest.approx(whole.step_time, rel=1e-9)
    assert (short.peak_memory, short.fits) == (whole.peak_memory, whole.fits)


@pytest.mark.parametrize(("name", "share"), [("mop_1t", 6), ("mixed", 1.3), ("gpt_oss_120b", 2.9)])
def test_most_ops_of_many_layers_are_not_played(name: str, share: float) -> None:
    """A period of six layers is played as often as one of one."""
    strategy, training = (
        mop(16, expert_parallel=16, vocab_parallel=8),
        TrainSpec(seq_len=4096, global_batch=64),
    )
    short, whole = (
        sum(op.layer >= 0 for op in lower(MODELS[name], strategy, training, compose=play).programs[0].ops)
        for play in (True, False)
    )
    assert short < whole / share


def test_patterns_with_a_period_are_found() -> None:
    layers = list(range(40))
    shown, gaps = compose(layers, ["dense"] * 2 + ["window", "full"] * 19, 1)
    assert shown[:2] == [0, 1]
    (gap,) = gaps
    assert len(gap.lead) == len(gap.tail) == 2
    assert len(shown) + 2 * gap.times == 40
    assert set(shown) | set(gap.hidden) == set(layers)
    assert compose(layers, layers, 1) == (layers, ())
