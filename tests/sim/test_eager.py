"""Software that composes what others fuse, routes naturally, or sums in a fixed order."""

import random
from statistics import fmean
from typing import Any, Literal

import msgspec
import pytest

from mopsim.cost.compute import memory_bound
from mopsim.cost.stack import DETERMINISTIC, SCORE_BYTES, as_used
from mopsim.engine import simulate
from mopsim.graph.ffn import ffn
from mopsim.graph.layer import decoder_layer
from mopsim.graph.rewrites.biases import bias_scaled
from mopsim.graph.rewrites.eager import HEAD_NORM_SUM, composed, in_blocks
from mopsim.graph.rewrites.projections import gradients_added, split
from mopsim.graph.rewrites.tensor_passes import COMPOSED, beside, traffic
from mopsim.graph.shapes import Shapes
from mopsim.graph.tape import Strided
from mopsim.program import lower
from mopsim.program.context import make_context
from mopsim.program.stage import Stage
from mopsim.program.workload import Work
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stack import Kernels, Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.training import TrainSpec
from mopsim.spec.upgrade import Unfused
from mopsim.strategies import fsdp2, megatron
from mopsim.validate.natural import busiest, natural, repeated
from tests.sim.toys import machine, small
from tests.software import changed, unfused

WIDE, BATCH = small(head_dim=128), TrainSpec(seq_len=2048, global_batch=8)

ROUTES = (8,) * 8


def stack(**kernels: Any) -> Stack:
    return Stack(name="mine", kernels=Kernels(**kernels))


ALL: tuple[Unfused, ...] = ("norms", "rotary", "activation", "residual", "experts")


def test_a_norm_by_hand() -> None:
    kernels = decoder_layer(small(), Shapes(tokens=16, seq_len=16, fused=True), 1, ROUTES).kernels
    found = {kernel.name: kernel for kernel in composed(kernels, {"norm": "composed"}, 2, 4, 2)}
    narrow, wide = 16 * 64 * 2, 16 * 64 * 4
    norm = COMPOSED["norm"]
    assert found["attention_norm"].bytes == traffic(norm.forward, narrow, wide) == 2 * narrow + 9 * wide
    assert found["attention_norm"].back_bytes == traffic(norm.backward, narrow, wide)
    assert found["attention_norm"].launches == 8
    untouched = {kernel.name: kernel for kernel in kernels}
    assert all(kernel == untouched[name] for name, kernel in found.items() if not name.endswith("norm"))


def test_halves_rotated_in_fp32_by_hand() -> None:
    """A cast, a product, half negated, both put together, a product, a sum, a cast; 68 bytes back."""
    kernels = decoder_layer(small(), Shapes(tokens=16, seq_len=16, fused=True), 1, ROUTES).kernels
    rope = next(one for one in composed(kernels, {"rotary": "upcast"}, 2, 4, 2) if one.name == "rope")
    elements = sum(value.bytes for value in rope.writes) / 2
    assert rope.bytes == (6 + 8 + 4 + 8 + 8 + 12 + 6) * elements
    assert rope.back_bytes == 68 * elements


def test_halves_of_one_tensor_and_norms_of_heads_take_what_a_published_table_of_kernels_says() -> None:
    """Qwen3-8B, 4,096 tokens of two tensor ranks on H100, of one on H200 (rates.yaml, strided;
    eager.HEAD_NORM_SUM)."""
    model = msgspec.structs.replace(small(), qk_norm="head")
    assert load_stack("megatron-core").kernels.head_norms == "summed"
    assert load_stack("megatron-bridge").kernels.head_norms == "summed"
    assert load_stack("megatron-core-local").kernels.head_norms == "fused"
    kernels = decoder_layer(model, Shapes(tokens=16, seq_len=16, fused=True), 1, ROUTES).kernels
    found = {kernel.name: kernel for kernel in composed(kernels, {"head_norms": "summed"}, 2, 4, 2)}
    assert found["q_norm"].back_serial == found["k_norm"].back_serial == HEAD_NORM_SUM
    assert not found["attention_norm"].back_serial
    dense = ffn(model, 64, "ffn", Shapes(tokens=16, seq_len=16, fused=True)).kernels
    act = next(one for one in composed(dense, {"activation": "strided"}, 2, 4, 2) if one.name == "act")
    rows = act.writes[0].bytes
    assert [value.bytes for value in act.writes] == [rows, rows]
    assert act.saves[-1] == act.writes[1].name
    assert (act.bytes, act.back_bytes) == (5 * rows, 13 * rows)
    assert act.strided == Strided(2 * rows, 5 * rows)
    seen = {"h100-sxm-80g": (6144, [157e-6, 314e-6]), "h200-sxm-141g": (12288, [278e-6, 539e-6])}
    for name, (width, seconds) in seen.items():
        took = [
            memory_bound(
                Work(
                    "memory_bound", bytes=one.narrow * 4096 * width * 2, launches=one.launches,
                    strided=one.elements * 4096 * width, strided_bytes=one.along * 4096 * width * 2,
                ),
                load_profile(name),
            )
            for one in (COMPOSED["gated_strided"].forward, COMPOSED["gated_strided"].backward)
        ]  # fmt: skip
        assert took == pytest.approx(seconds, rel=0.13), name


def test_route_weights_beside_the_rows_own_kernel_follow_strides() -> None:
    kernels = decoder_layer(small(), Shapes(tokens=16, seq_len=16, fused=True), 0, ROUTES).kernels
    one = next(kernel for kernel in kernels if len(kernel.writes) == 1 and kernel.writes[0].bytes)
    size = one.writes[0].bytes
    found = beside(one, size, COMPOSED["weighted"])
    assert (found.bytes - one.bytes, found.strided) == (2 * size, Strided(size, 2 * size))
    assert beside(found, size, COMPOSED["weighted"]).back_strided == Strided(2 * size, 4 * size)


def test_parts_of_one_projection_are_copied_and_their_gradients_put_together() -> None:
    model = small()
    kernels = decoder_layer(model, Shapes(tokens=16, seq_len=16, fused=True), 1, ROUTES).kernels
    q, k, v = next(kernel.writes for kernel in kernels if kernel.name == "qkv_proj")
    assert q.bytes > k.bytes == v.bytes, "query heads share keys"
    found = {kernel.name: kernel for kernel in split(kernels, copied=True)}
    assert found["qkv_split"].bytes == 2 * (q.bytes + v.bytes)
    assert found["qkv_split"].back_bytes == 2 * (q.bytes + k.bytes + v.bytes)
    (views,) = (kernel for kernel in split(kernels, copied=False) if kernel.name == "qkv_split")
    assert (views.bytes, views.launches) == (0, 0)
    assert views.back_bytes == found["qkv_split"].back_bytes


def test_attention_that_reads_the_projection_as_it_lies_needs_no_copies() -> None:
    learned = msgspec.structs.replace(small(), learned_positions=True)
    kernels = decoder_layer(learned, Shapes(tokens=16, seq_len=16, fused=True), 1, ROUTES).kernels
    assert split(kernels, copied=True) == kernels


@pytest.mark.parametrize(("eager", "qkv", "gate"), [(True, 6, 3), (False, 4, 3)])
def test_gradients_of_products_counted_as_one_are_added(eager: bool, qkv: int, gate: int) -> None:
    shapes = Shapes(tokens=16, seq_len=32, tensor=2, fused=True)
    kernels = decoder_layer(small(), shapes, 0).kernels
    found = {kernel.name: kernel for kernel in gradients_added(kernels, {"qkv_proj": 3, "up_proj": 2}, eager)}
    gathered = shapes.region_tokens * small().hidden_size * shapes.width
    assert found["qkv_proj_sum"].back_bytes == qkv * gathered, "at the width of the tensor group"
    assert found["up_proj_sum"].back_bytes == gate * gathered
    assert (found["qkv_proj_sum"].bytes, found["qkv_proj_sum"].launches) == (0, 0)


@pytest.mark.parametrize("part", [*ALL, "accumulation"])
def test_what_is_composed_costs_time_and_launches_but_no_products(part: Unfused) -> None:
    strategy = megatron(8, expert_parallel=2)
    training = TrainSpec(seq_len=64, global_batch=strategy.data_groups * strategy.micro_batch)
    fused, eager = (
        simulate(small(), machine(), 1, strategy, training, software)
        for software in (unfused(), unfused(part))
    )
    assert eager.step_time > fused.step_time
    assert eager.num_ops["memory_bound"] > fused.num_ops["memory_bound"]
    if part == "accumulation":  # gradients summed inside their products are traffic of those
        assert eager.busy["matmul"] < fused.busy["matmul"]
    else:
        assert eager.busy["matmul"] == fused.busy["matmul"]
    keeps = part in ("norms", "activation", "experts")
    assert (eager.peak_memory > fused.peak_memory) == keeps, "autograd keeps what lies between its kernels"


def test_natural_shares_are_shares_and_load_the_busiest_rank() -> None:
    for experts in (8, 60, 128, 256):
        assert sum(natural(experts, 4)) == pytest.approx(1.0)
        TrainSpec(seq_len=1, global_batch=1, routing=natural(experts, 4))
    orders = [random.Random(seed).sample(natural(128, 8), 128) for seed in range(1000, 1400)]
    assert busiest(natural(128, 8), 8) == pytest.approx(fmean(busiest(one, 8) for one in orders), rel=0.01)
    assert 1.2 < busiest(natural(128, 8), 8) < 1.4  # 1.3 in the middle of what is published
    assert natural(128, 8) == natural(128, 8)


def test_copies_of_a_word_choose_alike_and_load_few_ranks() -> None:
    one, two = repeated(128, 8, 8, 1), repeated(128, 8, 8, 2)
    assert sorted(set(one)) == [0.0, 1 / 8]
    assert sum(one) == pytest.approx(1.0) == sum(two)
    assert 8 <= sum(share > 0 for share in two) <= 16
    TrainSpec(seq_len=1, global_batch=1, routing=two)
    # 16 draws of 8 ranks: the fullest of 8 boxes with 16 balls holds 4 of them in the mean
    assert busiest(two, 8) == pytest.approx(2.0)
    assert busiest(repeated(128, 8, 8, 500), 8) < 1.2 < busiest(repeated(128, 8, 2, 2), 2) < 1.3
    assert busiest(one, 8) > 2.5


def test_a_printed_balancing_loss_gives_the_spread_of_loads() -> None:
    """A log of Mixtral prints 1.02, where the published spread of unbalanced networks would print 1.4."""
    even, printed, published = natural(8, 8, 1.0), natural(8, 8, 1.02), natural(8, 8)
    assert even == pytest.approx([1 / 8] * 8)
    assert 8 * sum(share**2 for share in printed) == pytest.approx(1.02)
    assert 1.2 < busiest(printed, 8) < 1.3 < 2.3 < busiest(published, 8)


def test_a_row_goes_once_to_a_rank_however_many_of_its_choices_lie_there() -> None:
    """4 experts on 4 ranks, 2 a token: at worst every row goes to the busiest rank, not more than once."""
    model = msgspec.structs.replace(small(), num_local_experts=4, num_experts_per_tok=2)
    plan = megatron(4, expert_parallel=4)
    once = msgspec.structs.replace(plan.experts, token_dispatcher="deepep")
    plan = msgspec.structs.replace(plan, experts=once)

    def exchanged(routing: str) -> float:
        training = TrainSpec(seq_len=4096, global_batch=plan.data_groups * plan.micro_batch, routing=routing)
        return simulate(model, machine(scale_up=400), 1, plan, training).busy["all_to_all"]

    even, uneven = 2 / 4, 1  # 50 % of all choices to one expert of four: one of every row
    assert exchanged("50/1") / exchanged("balanced") == pytest.approx(uneven / even, rel=0.01)


def test_a_mapped_dispatch_gathers_the_choices_of_all_rows_once_a_forward() -> None:
    plan = megatron(4, expert_parallel=4)
    training = TrainSpec(seq_len=64, global_batch=plan.data_groups * plan.micro_batch)

    def works(mapped: bool) -> list[Work]:
        sent = "hybridep" if mapped else "deepep"
        once = msgspec.structs.replace(
            plan, experts=msgspec.structs.replace(plan.experts, token_dispatcher=sent)
        )
        software = changed("megatron-core")
        program = lower(small(), once, training, 8, software).programs[0]
        assert all(op.work[-1].kind == "all_to_all" for op in program.ops if op.name == "dispatch")
        return [work for op in program.ops if op.name == "dispatch" for work in op.work[:-1]]

    model, found = small(), works(True)
    assert works(False) == []
    assert [work.kind for work in found] == ["all_gather", "memory_bound"] * model.num_moe_layers
    assert {work.bytes for work in found} == {4.0 * 64 * model.num_local_experts}


@pytest.mark.parametrize(
    ("wider", "forward", "backward", "launches"), [(1.0, 12, 16, (5, 9)), (2.0, 28, 40, (6, 14))]
)
def test_a_bias_times_route_weights_by_hand(
    wider: float, forward: int, backward: int, launches: tuple[int, int]
) -> None:
    """Bytes of an element of bf16 rows of two experts, with weights in bf16 and in fp32."""
    model = small(expert_bias=True)
    tape = decoder_layer(model, Shapes(tokens=16, seq_len=16, fused=True), 1, (12, 20)).kernels
    bias = next(kernel for kernel in bias_scaled(tape, wider) if kernel.name == "experts_down_bias")
    elements = 32 * model.hidden_size
    assert (bias.bytes, bias.back_bytes) == (forward * elements, backward * elements)
    assert (bias.launches, bias.back_launches) == launches


def test_what_a_mapped_dispatch_exposes_is_booked_on_its_gather_and_its_exchange() -> None:
    plan = megatron(4, expert_parallel=4)
    experts = msgspec.structs.replace(plan.experts, token_dispatcher="hybridep")
    plan = msgspec.structs.replace(plan, experts=experts)
    training = TrainSpec(seq_len=4096, global_batch=plan.data_groups * plan.micro_batch)
    result = simulate(small(), machine(scale_up=400), 1, plan, training, changed("megatron-core"))
    assert result.exposed["all_to_all"] == pytest.approx(result.busy["all_to_all"])
    assert result.exposed["all_gather"] <= result.busy["all_gather"] * (1 + 1e-9)


def test_a_deterministic_mode_writes_every_new_tensor_once_more() -> None:
    plan = megatron(1)
    training = TrainSpec(seq_len=64, global_batch=1)

    def layers(*words: Unfused) -> tuple[float, int]:
        ops = lower(small(), plan, training, 8, unfused(*words)).programs[0].ops
        moved = [w for op in ops if op.phase == "forward" for w in op.work if w.kind == "memory_bound"]
        return sum(w.bytes for w in moved), sum(w.launches for w in moved)

    (plain, few), (filled, more) = layers(), layers("fills")
    shapes = Shapes(tokens=64, seq_len=64, fused=True)
    model = small()
    made = [
        value.bytes
        for layer in range(model.num_hidden_layers)
        for kernel in decoder_layer(model, shapes, layer, ROUTES if model.is_moe_layer(layer) else ()).kernels
        if kernel.kind != "view"
        for value in kernel.writes
    ]
    assert filled - plain >= sum(made) > 0  # and what embedding and loss make
    assert more - few >= sum(size > 0 for size in made)


def test_blocks_of_keys_and_values_are_merged_by_hand() -> None:
    model, ranks = small(), 4
    shapes = Shapes(tokens=64, seq_len=256, sequence=ranks, exchange="all_gather", fused=True)
    plain = decoder_layer(model, shapes, 0).kernels
    found = in_blocks(plain, ranks, 2, 4)
    core = next(i for i, kernel in enumerate(found) if kernel.name == "attention_core")
    merge, out = found[core + 1], found[core].writes[0].bytes
    assert (*found[:core], plain[core], *found[core + 2 :]) == plain
    keys = next(k.bytes for k in plain if k.name == "gather_kv_blocks") / ranks
    # four outputs in fp32 at once; back, keys and values packed, and in fp32 three times their gradients
    assert found[core].scratch == (("activations", out * 4 * 2),)
    assert found[core].back_scratch[1:] == (("activations", 2 * out + keys * (1 + 1 + 3 * 2)),)
    # all four are cast; three are merged in nine passes in fp32, twice as wide; two passes cast the sum back
    assert merge.bytes == out * (4 + 1 + 2 * (3 * 9 + 2)) + 3 * 2 * keys
    assert merge.back_bytes == out * (4 * 5 + 5) + keys * (4 * 9 + 5) + 3 * 2 * keys
    alone = decoder_layer(model, Shapes(tokens=64, seq_len=64, fused=True), 0).kernels
    assert in_blocks(alone, 1, 2, 4) == alone
    # blocks that go round are merged alike; a script merges a block in four passes and packs nothing
    rings = Shapes(tokens=64, seq_len=256, sequence=ranks, exchange="ring", fused=True)
    around = decoder_layer(model, rings, 0).kernels
    composed, scripted = (in_blocks(around, ranks, 2, 4, way) for way in ("composed", "scripted"))
    place = next(i for i, kernel in enumerate(around) if kernel.name == "attention_core")
    assert (composed[place + 1].bytes, composed[place + 1].back_bytes) == (merge.bytes, merge.back_bytes)
    assert composed[place].back_scratch[1:] == found[core].back_scratch[1:]
    assert scripted[place + 1].bytes == out * (4 + 1 + 2 * (3 * 4 + 2))
    assert scripted[place + 1].back_bytes == (out + keys) * (4 * 5 + 1)


def test_kept_scores_are_as_fast_as_narrow_products_and_the_traffic_allow() -> None:
    a100 = load_profile("a100-sxm-80g")
    kept = stack(attention={"default": "scores"})
    rates = {d: as_used(a100, kept, small(head_dim=d), BATCH).device.attention.forward for d in (64, 128)}
    assert rates[64] < rates[128] < 2 * rates[64]  # a head twice as wide: as many scores, products as slow
    # 0.31 and 0.44 of the peak: 65536 x 2048 x 128 and 65536 x 128 x 2048 of the measured table, with traffic
    peak, bandwidth = 312e12, a100.device.memory_bandwidth.si
    score = 2 * 128 / peak * (1 / 0.31 + 1 / 0.44) + SCORE_BYTES["forward"] / bandwidth
    assert rates[128] == pytest.approx(2 * 128 / score / peak, rel=0.1)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_an_eager_program_has_fsdp_or_not(zero: Literal[0, 1, 2, 3]) -> None:
    """Below ZeRO-2 it gathers no layer's parameters, and its gradients are whole through the step."""
    strategy = megatron(8)
    dense = msgspec.structs.replace(strategy.dense, zero=zero, fsdp=8 if zero else 1, prefetch=int(zero == 3))
    strategy = msgspec.structs.replace(strategy, dense=dense)
    stack, training = load_stack("generic-eager"), TrainSpec(seq_len=32, global_batch=16)
    found = lower(small(), strategy, training, 8, stack)
    gathers = [op for op in found.programs[0].ops if op.name.startswith("gather ") and op.phase == "forward"]
    assert bool(gathers) == (zero >= 2)
    assert found.stack == stack
    result = simulate(small(), machine(), 2, strategy, training, stack)
    whole = sum(unit.numel for unit in Stage(make_context(small(), strategy, training, 8, stack), 0).units)
    assert (result.highest_by_category["grads"] >= 4 * whole) == (zero < 2)


def test_a_layers_experts_are_gathered_in_a_group_of_their_own_ranks() -> None:
    """Eight shards over four nodes take as long however the dense part is sharded: also over eight ranks, of
    one node."""
    model, training = load_model("qwen3_30b_a3b"), TrainSpec(seq_len=4096, global_batch=64)
    h100, stack = load_profile("h100-sxm-80g"), load_stack("nemo-automodel")
    found = {}
    for dense in (8, 16, 32):
        strategy = fsdp2(32, expert_parallel=4, expert_fsdp=8, fsdp=dense, micro_batch=1, recompute="full")
        found[dense] = simulate(model, h100, 4, strategy, training, stack).busy["all_gather"]
    assert found[8] == pytest.approx(found[32], rel=0.05)
    assert found[16] == pytest.approx(found[32], rel=0.05)


def test_a_fixed_order_slows_attention_backward() -> None:
    hopper, blackwell = load_profile("h100-sxm-80g"), load_profile("b200-sxm-192g")
    ordered = stack(deterministic=True)
    free, fixed = hopper.device.attention, as_used(hopper, ordered, WIDE, BATCH).device.attention
    assert (fixed.forward, fixed.backward) == (free.forward, free.backward * DETERMINISTIC)
    flash2 = as_used(hopper, stack(attention={"default": "flash2"}), WIDE, BATCH).device.attention
    there = as_used(blackwell, ordered, WIDE, BATCH).device.attention
    rate, other = 989.4e12 * flash2.forward / 132, 2250e12 * there.forward / 148
    assert other == pytest.approx(rate, rel=0.12)  # an SM is about as fast at Ampere's instructions
    assert as_used(blackwell, stack(), WIDE, BATCH) == blackwell


def test_products_of_their_own_are_split_over_tensor_parallel_ranks() -> None:
    """A program with gate and up apart exchanges rows around its FFN as one that joins them does."""
    joined, apart = (
        simulate(
            load_model("llama3_8b"), load_profile("h100-sxm-80g"), 1, fsdp2(8, tensor_parallel=2),
            TrainSpec(seq_len=4096, global_batch=8), changed("mopexec-fsdp2", kernels={"gate_up": how}),
        )
        for how in ("joined", "separate")
    )  # fmt: skip
    assert apart.num_ops["all_gather"] == joined.num_ops["all_gather"]
    assert apart.flops == pytest.approx(joined.flops)
