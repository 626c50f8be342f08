"""What torch and Megatron-LM hold beside: buckets, gathers in fp32, a shifted copy of the logits."""

from typing import Any

import pytest
from msgspec.structs import replace

from mopsim.common.units import DTYPE_BYTES
from mopsim.engine import SimResult, simulate
from mopsim.graph import tensors
from mopsim.program import lower
from mopsim.spec.kernels import EXACT
from mopsim.spec.profiles import load_profile
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron
from tests.sim.toys import small
from tests.software import changed


def played(
    plan: Strategy, stack: str, batch: int = 8, card: str = "h100-sxm-80g", **sections: dict[str, Any]
) -> SimResult:
    training = TrainSpec(seq_len=64 if batch > 1 else 8192, global_batch=batch)
    return simulate(small(), load_profile(card), 1, plan, training, changed(stack, **sections))


def whole(ranks: int) -> Strategy:
    plan = megatron(world_size=ranks)
    return replace(
        plan, dense=replace(plan.dense, zero=0, fsdp=1), experts=replace(plan.experts, expert_fsdp=1)
    )


def test_ranks_that_sum_whole_gradients_have_buckets() -> None:
    one, two = (played(whole(n), "litgpt") for n in (1, 2))
    assert two.memory_by_category["grads"] == 2 * one.memory_by_category["grads"]


@pytest.mark.parametrize("gathers", ["compute", "param"])
def test_weights_are_gathered_as_shards_are_where_nothing_casts_them(gathers: str) -> None:
    found = played(fsdp2(world_size=2), "transformers-fsdp1", sharding={"gathers": gathers})
    usual = played(fsdp2(world_size=2), "transformers-fsdp1")
    times = 2 if gathers == "param" else 1
    assert found.highest_by_category["gathered"] == times * usual.highest_by_category["gathered"]


def test_a_maximum_that_is_subtracted_out_of_place_takes_another_copy() -> None:
    usual, more = (
        played(megatron(world_size=1), "megatron-lm", kernels={"loss": loss})
        for loss in ("in_place", "shifted")
    )
    logits = 64 * small().vocab_size * 4
    assert more.highest_by_category["logits"] == usual.highest_by_category["logits"] + logits


def test_log_probabilities_made_step_by_step_take_two_more_copies() -> None:
    """The logits in bf16 and, in fp32, their copy, that without its maximum and what is returned."""
    plan = megatron(world_size=1)
    found = played(plan, "megatron-lm", kernels={"loss": "log_probs"})
    assert found.highest_by_category["logits"] == 64 * small().vocab_size * (2 + 3 * 4)


def test_gradients_that_zero_grad_frees_live_from_their_backward_to_the_end_of_the_step() -> None:
    stays, goes = (played(whole(1), "litgpt", 1, sharding={"zero_grad": how}) for how in ("buffers", "frees"))
    assert goes.highest_by_category["grads"] == stays.highest_by_category["grads"]
    assert goes.peak_memory < stays.peak_memory


def test_values_that_attention_keeps_in_the_projection_keep_all_of_it() -> None:
    plan = replace(
        fsdp2(world_size=2), activations=replace(fsdp2(world_size=2).activations, recompute="none")
    )
    apart, joined = (
        played(plan, "torchtitan-compile", kernels={"qkv_split": how, "grouped_heads": "shared"})
        for how in ("views", "kept")
    )
    model = small()
    more = 64 * 2 * model.head_dim * (model.num_attention_heads + model.num_key_value_heads)
    assert joined.highest_by_category["activations"] - apart.highest_by_category["activations"] == (
        more * model.num_hidden_layers
    )


@pytest.mark.parametrize("how", ["made", "kept"])
def test_what_a_compiled_cast_reads_is_made_again_from_what_others_keep(how: str) -> None:
    plan = fsdp2(world_size=2)
    plan = replace(
        plan, activations=replace(plan.activations, recompute="none"),
        precision=replace(plan.precision, matmul="fp8"),
    )  # fmt: skip
    again, less = (
        played(plan, "torchtitan-compile", kernels={"casts": casts, "weight_casts": weights})
        for casts, weights in (("again", "step"), ("made", "kept" if how == "kept" else "step"))
    )
    assert less.highest_by_category["activations"] < again.highest_by_category["activations"]
    held = less.highest_by_category["gathered"] - again.highest_by_category["gathered"]
    assert (held > 0) == (how == "kept")


@pytest.mark.parametrize("how", ["cached", "rows"])
@pytest.mark.parametrize("chunk_tokens", [0, 16])
def test_cast_weights_that_modules_keep_are_there_for_good(chunk_tokens: int, how: str) -> None:
    """In both layouts or one; once, however many chunks of tokens the experts take them for."""
    plan = fsdp2(world_size=2)
    plan = replace(
        plan, precision=replace(plan.precision, matmul="fp8"),
        experts=replace(plan.experts, chunk_tokens=chunk_tokens),
    )  # fmt: skip
    once, cached = (
        played(plan, "nemo-automodel", kernels={"weight_casts": casts}) for casts in ("step", how)
    )
    cast = [one for one in tensors(small()) if one.component not in EXACT and len(one.shape) > 1]
    matrices = sum(one.numel for one in cast if one.layer >= 0)
    each = (2 if how == "cached" else 1) * DTYPE_BYTES["fp8"]
    assert cached.resident_memory - once.resident_memory == pytest.approx(each * matrices, rel=1e-3)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_weights_that_lie_in_4_bits_alone_have_whole_masters(moments: Any) -> None:
    """Beside moments in bf16 those of bf16 weights are what these lack (megatron-core's adamw, widened)."""
    plan = megatron(world_size=2)
    plan = replace(plan, precision=replace(plan.precision, matmul="nvfp4", moments=moments))
    once, only = (
        played(plan, "megatron-core", card="b200-sxm-192g", kernels={"weight_casts": how})
        for how in ("step", "only")
    )
    every = tensors(small())
    cast = [one for one in every if one.component not in EXACT and len(one.shape) > 1 and one.layer >= 0]
    fewer = (2 - 2 * DTYPE_BYTES["nvfp4"]) * sum(one.numel for one in cast)
    more = 2 * sum(one.numel for one in every) / 2 if moments == "bfloat16" else 0  # of two ranks
    assert only.resident_memory - once.resident_memory == pytest.approx(more - fewer, rel=1e-2)


def test_weights_of_layers_are_gathered_in_the_8_bits_that_products_read() -> None:
    plan = fsdp2(world_size=2)
    plan = replace(plan, precision=replace(plan.precision, matmul="fp8"))
    wide, narrow = (played(plan, "torchtitan", sharding={"gathers": how}) for how in ("compute", "cast"))
    assert narrow.busy["all_gather"] < wide.busy["all_gather"]
    assert narrow.highest_by_category["gathered"] < wide.highest_by_category["gathered"]


def test_a_host_that_waits_for_the_device_gathers_late_unless_it_is_told_to_ahead() -> None:
    told, reached = (
        played(
            fsdp2(world_size=2), "torchtitan", sharding={"prefetch": how}, host={"counts_read": "always"}
        ).exposed["all_gather"]
        for how in ("told", "reached")
    )
    assert reached > told


@pytest.mark.parametrize("how", ["told", "reached"])
def test_a_gather_waits_for_the_upload_of_its_shard(how: str) -> None:
    stack, training = changed("torchtitan", sharding={"prefetch": how}), TrainSpec(seq_len=64, global_batch=2)
    ops = lower(small(), fsdp2(world_size=2, offload=True), training, 2, stack).programs[0].ops
    gathers = [op for op in ops if op.name.startswith("gather ") and op.phase == "forward"]
    for op in gathers:
        before = [ops[i] for i in op.deps]
        names = [one.name for one in before] + [ops[i].name for one in before for i in one.deps]
        assert op.name.replace("gather", "upload") in names
    assert gathers


@pytest.mark.parametrize(("ranks", "told"), [(1, False), (2, True)])
def test_split_experts_are_told_what_to_gather_ahead(ranks: int, told: bool) -> None:
    assert changed("torchtitan").sharding.told(fsdp2(world_size=2, expert_parallel=ranks)) == told


@pytest.mark.parametrize("what", ["gathered", "gathered_grads"])
def test_modules_that_are_wrapped_one_by_one_are_whole_one_by_one(what: str) -> None:
    layers, each = (
        played(fsdp2(world_size=2), "litgpt", sharding={"groups": how}).highest_by_category[what]
        for how in ("layers", "each")
    )
    assert each < layers


@pytest.mark.parametrize(("zero", "alike"), [(0, "cached"), (1, "only"), (3, "step")])
def test_weights_lie_in_4_bits_alone_where_masters_are_sharded(zero: int, alike: str) -> None:
    """Megatron-Core asserts the distributed optimizer for fp8_param_gather."""
    plan = megatron(world_size=2)
    plan = replace(
        plan, dense=replace(plan.dense, zero=zero), precision=replace(plan.precision, matmul="nvfp4")
    )
    held = {
        how: played(
            plan, "megatron-core", card="b200-sxm-192g", kernels={"weight_casts": how}
        ).resident_memory
        for how in ("step", "cached", "only")
    }
    assert held["only"] == held[alike]
    assert held["cached"] > held["step"]
