"""The families: what each sets, at every precision."""

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from mopsim.common.errors import SpecError
from mopsim.common.io import convert, to_plain
from mopsim.spec.capability import Job, refusals, runnable
from mopsim.spec.presets import load_model
from mopsim.spec.strategy import Strategy
from mopsim.strategies import fsdp2, megatron, mop, zero_offload

FAMILIES = {"mop": mop, "fsdp2": fsdp2, "zero_offload": zero_offload, "megatron": megatron}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["bfloat16", "float32", "float64"])
def test_a_family_survives_yaml(family: str, precision: str) -> None:
    strategy = FAMILIES[family](8, dtype=precision)  # type: ignore[operator]
    assert convert(to_plain(strategy), Strategy, "strategy") == strategy


def test_mop_is_the_papers() -> None:
    """arXiv 2607.01844: bf16 weights and gradients on the device, fp32 state streamed from the host,
    full recompute."""
    s = mop(16, context_parallel=2, expert_parallel=16, vocab_parallel=8, grad_dtype="bfloat16")
    assert (
        s.attention.context_parallel,
        s.experts.expert_parallel,
        s.vocabulary.vocab_parallel,
        s.dense.fsdp,
    ) == (2, 16, 8, 16)
    assert (s.stack, s.vocabulary.loss, s.activations.recompute, s.activations.layer_inputs) == (
        "mopexec-flat",
        "ring",
        "full",
        "host",
    )
    assert (s.optimizer.state_tier, s.optimizer.update_on) == ("host", "device")
    assert (s.precision.param, s.precision.grad, s.precision.master) == ("bfloat16", "bfloat16", "float32")


@pytest.mark.parametrize("family", [mop, fsdp2, zero_offload])
def test_gradients_are_summed_in_fp32(family: Callable[[int], Strategy]) -> None:
    p = family(2).precision
    assert (p.compute, p.reduce, p.grad) == ("bfloat16", "float32", "float32")


def test_experts_are_sharded_over_their_replicas() -> None:
    assert mop(16, expert_parallel=4).experts.expert_fsdp == 4
    assert fsdp2(16, expert_parallel=2).experts.expert_fsdp == 8


def test_fsdp2_holds_its_master_in_the_shard() -> None:
    s = fsdp2(8, offload=True)
    assert s.stack == "mopexec-fsdp2"
    assert (s.precision.param, s.precision.compute, s.precision.master) == ("float32", "bfloat16", "param")
    assert (s.dense.param_tier, s.dense.grad_tier, s.optimizer.state_tier, s.optimizer.update_on) == (
        "host",
    ) * 4


def test_float64_is_float64_everywhere() -> None:
    for family in (mop, fsdp2, zero_offload):
        p = family(2, dtype="float64").precision
        assert {p.compute, p.param, p.reduce, p.grad, p.moments} == {"float64"}
        assert p.master in ("param", "float64")


def test_a_degree_that_does_not_divide_is_refused_by_name() -> None:
    with pytest.raises(SpecError, match=r"attention.context_parallel: 3 does not divide the 8 ranks"):
        mop(8, context_parallel=3)
    with pytest.raises(SpecError, match=r"experts.expert_parallel: 5 does not divide"):
        fsdp2(8, expert_parallel=5)
    with pytest.raises(SpecError, match=r"dense.tensor_parallel: 3 does not divide"):
        megatron(8, tensor_parallel=3)


def test_support_names_the_field() -> None:
    tiny = load_model("tiny")
    assert runnable(mop(2), tiny) is None
    assert runnable(fsdp2(2), tiny) is None
    assert runnable(zero_offload(2), tiny) is None
    fields = {
        error.field
        for error in refusals(Job(tiny, megatron(4, tensor_parallel=2, pipeline_parallel=2)), by="flat_units")
    }
    assert {
        "strategy.pipeline.pipeline_parallel",
        "strategy.dense.tensor_parallel",
        "strategy.dense.zero",
    } <= fields
    assert runnable(mop(2), load_model("llama4_maverick")) is None
    reason = runnable(mop(2), replace(tiny, dropout=0.1))
    assert reason.field == "model.dropout"
    reason = runnable(mop(2, optimizer_overlap="backward"), load_model("deepseek_v3"))
    assert reason.field == "strategy.optimizer.overlap"
