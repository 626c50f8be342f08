"""Prices that shape or place decide: attention in a window and by head width, sums of weight gradients,
biases of experts, groups under host bridges; and pipelines whose edges count as layers."""

from typing import Literal

import msgspec
import pytest
from msgspec.structs import replace

from mopsim.cost import seconds
from mopsim.cost.compute import (
    ATOMIC_SUMS,
    EXPERT_GRADIENTS_EXPOSED,
    SERIAL_ROW,
    SORTED_SUMS,
    for_heads,
)
from mopsim.cost.stack import CLOCK_BY_POWER, as_used
from mopsim.graph.shapes import attended_span, causal_pairs, pairs_of_a_slice
from mopsim.program.casts import Part
from mopsim.program.context import make_context
from mopsim.program.passes import Passes
from mopsim.program.topology import span
from mopsim.program.workload import CommGroup, Work
from mopsim.program.works import works
from mopsim.spec.hardware import Bridges
from mopsim.spec.profiles import load_profile
from mopsim.spec.stack import Kernels, Stack
from mopsim.spec.training import TrainSpec
from mopsim.strategies import megatron
from mopsim.validate.parallelism import edges_counted
from tests.sim.toys import machine, quantity, small

TOY = machine()
WIDE, LONG = small(head_dim=128), TrainSpec(seq_len=8192, global_batch=8)


@pytest.mark.parametrize(
    ("gpu", "tokens", "window", "heads", "milliseconds"),
    [("b200-sxm-192g", 8192, 128, 64, 0.113408), ("b200-sxm-192g", 32768, 128, 64, 0.436928)],
)
def test_attention_in_a_window_is_met_on_a_card_it_was_not_fitted_on(
    gpu: str, tokens: int, window: int, heads: int, milliseconds: float
) -> None:
    """Forward at heads of 64, cuDNN 9.27 (NVIDIA/cudnn-frontend, benchmark/attention_inference, gpt_oss):
    the curve is GB200's."""
    flops = 4 * causal_pairs(tokens, window) * 64 * heads
    work = Work("attention", flops=flops, seq=attended_span(tokens, window), dtype="bfloat16")
    found = seconds(work, for_heads(load_profile(gpu), 64))
    assert found == pytest.approx(milliseconds / 1e3, rel=0.15)


@pytest.mark.parametrize(
    ("n", "k", "experts", "microseconds"),
    [
        (8192, 5120, 2, 39487.6), (8192, 5120, 4, 39189.2), (8192, 5120, 8, 37700.7),
        (2048, 7168, 1, 13064.8), (2048, 7168, 2, 14900.2), (2048, 7168, 4, 15823.6),
        (2048, 7168, 8, 14966.8),
    ],
)  # fmt: skip
def test_torch_is_slower_at_grouped_products_on_blackwell(
    n: int, k: int, experts: int, microseconds: float
) -> None:
    """Forward and backward of 128,000 rows on B200 (torchao/prototype/moe_training/README.md), and of the
    mean squared error timed with them: five passes over what they make (benchmarks/utils.py)."""
    stack = Stack(name="mine", kernels=Kernels(expert_products="torch"))
    b200, h200 = (
        as_used(load_profile(name), stack, WIDE, LONG) for name in ("b200-sxm-192g", "h200-sxm-141g")
    )
    m = 128000 / experts
    found = sum(
        seconds(Work("grouped_matmul", m=a, n=b, k=c, count=experts, dtype="bfloat16"), b200)
        for a, b, c in ((m, n, k), (m, k, n), (k, n, m))
    )
    found += seconds(Work("memory_bound", bytes=5 * 128000 * n * 2), b200)
    assert found == pytest.approx(microseconds / 1e6, rel=0.12)
    assert h200 == load_profile("h200-sxm-141g")


@pytest.mark.parametrize("window", [0, 24])
def test_the_last_of_slices_in_order_attends_to_the_most(window: int) -> None:
    seen = [min(place + 1, window or 64) for place in range(64)]
    assert pairs_of_a_slice(64, 4, True, window) == sum(seen[48:])
    assert pairs_of_a_slice(64, 4, False, window) == sum(seen) / 4


def test_a_window_as_long_as_the_sequence_is_none() -> None:
    assert attended_span(4096) == attended_span(4096, 4096) == attended_span(4096, 9999) == 4096
    assert attended_span(32768, 128) == pytest.approx(2 * 128, rel=0.01)


def test_attention_is_held_by_power() -> None:
    shape = msgspec.structs.replace(TOY.device.attention, held=0.4)
    held = msgspec.structs.replace(TOY, device=msgspec.structs.replace(TOY.device, attention=shape))
    work = Work("attention", flops=1e15, seq=4096, dtype="bfloat16")
    assert seconds(work, held) == pytest.approx(seconds(work, TOY) * 0.5 / 0.4)
    back = replace(work, backward=True)  # at 0.25 already
    assert seconds(back, held) == seconds(back, TOY)


def test_a_card_of_less_power_runs_a_kernel_at_a_lower_clock() -> None:
    stack = Stack(name="flash2", kernels=Kernels(attention={"default": "flash2"}))
    full, less = (as_used(load_profile(f"h100-sxm-{size}"), stack, WIDE, LONG) for size in ("80g", "96g"))
    ratio = less.device.attention.forward / full.device.attention.forward
    assert ratio == pytest.approx((500 / 700) ** CLOCK_BY_POWER)


def test_torch_on_amd_runs_a_slower_kernel_than_aiter() -> None:
    """torch's SDPA on MI355X: 630 TFLOP/s forward and 224 backward at 8192 tokens (HipKittens)."""
    stack = Stack(name="flash2", kernels=Kernels(attention={"default": "flash2"}))
    for name in ("mi300x-192g", "mi325x-256g", "mi355x-288g"):
        own = load_profile(name)
        torch = as_used(own, stack, WIDE, LONG).device.attention
        assert torch.forward * 1.18 < own.device.attention.forward
        assert torch.backward * 2 < own.device.attention.backward
    rates = [share * 2516.6 * 8192 / (8192 + torch.seq_half) for share in (torch.forward, torch.backward)]
    assert rates == pytest.approx([630, 224], rel=0.1)


def test_a_weight_gradient_moves_the_sum_that_it_is_added_to() -> None:
    plain = Work("grouped_matmul", m=4096, n=1024, k=64, count=8, dtype="bfloat16")
    summed = replace(plain, gradient=8.0)
    more = EXPERT_GRADIENTS_EXPOSED * 8.0 * 8 * 4096 * 1024 / TOY.device.memory_bandwidth.si
    assert seconds(summed, TOY) - seconds(plain, TOY) == pytest.approx(more)
    dense = replace(plain, kind="matmul", count=1, gradient=4.0)
    assert seconds(dense, TOY) == seconds(replace(dense, gradient=0.0), TOY)


def test_rows_added_to_one_row_wait_for_each_other() -> None:
    work = Work("memory_bound", bytes=1e6, serial=1000.0)
    assert seconds(work, TOY) == pytest.approx(1e-6 + 1000 * SERIAL_ROW)


def test_atomic_sums_bound_what_traffic_does_not() -> None:
    few, many = (Work("memory_bound", bytes=1e9, sums=sums) for sums in (1e6, 1e9))
    assert seconds(few, TOY) == pytest.approx(1e-3)
    assert seconds(many, TOY) == pytest.approx(1e9 / ATOMIC_SUMS)


def test_a_row_that_a_sorted_sum_adds_waits_for_the_one_before_it() -> None:
    """Of 132 to 148 SMs with 16 blocks, whose one warp of four adds 128 columns of a row at a time."""
    work = Work("memory_bound", bytes=1e9, ordered=1e9)
    assert seconds(work, TOY) == pytest.approx(1e9 / SORTED_SUMS)
    assert 132 <= SORTED_SUMS * SERIAL_ROW / (16 * 128) <= 148


@pytest.mark.parametrize("dispatcher", ["alltoall", "deepep"])
@pytest.mark.parametrize("compiled", [False, True])
def test_rows_are_added_once_sorted_but_for_what_a_kernel_sent_or_a_compiler_made(
    dispatcher: Literal["alltoall", "deepep"], compiled: bool
) -> None:
    """A token has 2 routes here, so that two warps of a block work."""
    stack = Stack(name="mine", kernels=Kernels(row_sums="sorted", expert_rows="added", compiled=compiled))
    strategy = megatron(8, expert_parallel=4, token_dispatcher=dispatcher)
    training = TrainSpec(seq_len=32, global_batch=8, routing="balanced")
    context = make_context(small(), strategy, training, 8, stack)
    found: dict[tuple[Part, bool], float] = {}
    for kernel in Passes(context).tape(small().num_hidden_layers - 1).kernels:
        parts: tuple[Part, ...] = ("forward", "backward")
        for part in parts:
            for one in works(kernel, part, context):
                for kind, elements in ((True, one.ordered), (False, one.sums)):
                    found[part, kind] = found.get((part, kind), 0.0) + elements
    sorts = {(part, True) for part, kind in found if kind and found[part, kind]}
    atomic = {(part, False) for part, kind in found if not kind and found[part, kind]}
    if dispatcher == "deepep":
        assert (sorts, atomic) == (set(), {("forward", False), ("backward", False)})
        return
    routes = 32 * 64 * 2
    assert sorts == ({("forward", True)} if compiled else {("forward", True), ("backward", True)})
    assert atomic == ({("backward", False)} if compiled else set())
    assert found["forward", True] == pytest.approx(routes / 2, rel=0.3)
    assert found["backward", not compiled] == pytest.approx(routes / (1 if compiled else 2))


def test_groups_under_one_bridge_are_fast_and_those_across_share_the_link() -> None:
    bridges = Bridges(devices=4, faster={"all_gather": 2.0}, link=quantity(100, "GB/s"))
    up = msgspec.structs.replace(TOY.scale_up, bridges=bridges)
    profile = msgspec.structs.replace(TOY, scale_up=up)
    groups = {"whole": span(range(8), 8), "near": span(range(4), 8), "across": span(range(0, 8, 2), 8)}
    assert {name: group.block for name, group in groups.items()} == {"whole": 8, "near": 4, "across": 8}
    for name, rate in (("whole", 100e9), ("near", 200e9), ("across", 50e9)):
        work = Work("all_gather", bytes=8e9, group=groups[name])
        wire = 8e9 * (groups[name].size - 1) / groups[name].size
        assert seconds(work, profile) == pytest.approx(wire / rate), name
    unknown = Work("all_gather", bytes=8e9, group=CommGroup(4, 4))
    assert seconds(unknown, profile) == seconds(unknown, TOY)


def test_edges_count_as_layers_where_only_so_parts_are_alike() -> None:
    assert edges_counted(126, 64) == (1, *(2,) * 62, 1)
    assert edges_counted(126, 128) == (0, *(1,) * 126, 0)
    assert edges_counted(80, 16) == edges_counted(61, 16) == edges_counted(126, 1) == ()
