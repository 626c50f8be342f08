"""Seconds by hand on the toy machine, and corrections."""

from itertools import combinations

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from mopsim.common.errors import SpecError
from mopsim.cost import raw_seconds, seconds
from mopsim.cost.communication import reached
from mopsim.program import lower
from mopsim.program.topology import span
from mopsim.program.workload import CommGroup, Work
from mopsim.search.wires import Message, Wires
from mopsim.spec.hardware import Correction, MatmulCurve
from mopsim.spec.profiles import load_profile
from mopsim.spec.stack import Sharding, Stack
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2
from tests.sim.toys import machine, quantity, small

TOY = machine()


def test_matmul_is_arithmetic_or_traffic() -> None:
    big = Work("matmul", m=4096, n=4096, k=4096, dtype="bfloat16")
    assert seconds(big, TOY) == pytest.approx(2 * 4096**3 / 100e12)
    thin = Work("matmul", m=1, n=4096, k=4096, dtype="bfloat16")
    assert seconds(thin, TOY) == pytest.approx((4096 + 4096 * 4096 + 4096) * 2 / 1e12)


def test_small_products_run_below_the_peak() -> None:
    curve = MatmulCurve(
        dtype="bfloat16",
        peak=quantity(100, "TFLOP/s"),
        efficiency=0.8,
        m_half=128,
        tag="assumed",
        source="toy",
    )
    device = msgspec.structs.replace(TOY.device, matmul=(curve,), launch_overhead=quantity(5, "us"))
    profile = msgspec.structs.replace(TOY, device=device)
    work = Work("grouped_matmul", m=128, n=4096, k=4096, count=8, dtype="bfloat16")
    assert seconds(work, profile) == pytest.approx(8 * 2 * 128 * 4096**2 / (80e12 * 0.5) + 5e-6)


def test_power_bounds_large_products_only() -> None:
    [curve] = [one for one in TOY.device.matmul if one.dtype == "bfloat16"]
    bounded = msgspec.structs.replace(curve, m_half=4096, held=0.6)
    profile = msgspec.structs.replace(TOY, device=msgspec.structs.replace(TOY.device, matmul=(bounded,)))
    for m, share in ((4096, 0.5), (4 * 4096, 0.6)):
        work = Work("matmul", m=m, n=4096, k=4096, dtype="bfloat16")
        assert seconds(work, profile) == pytest.approx(2 * m * 4096**2 / (share * 100e12))


def test_attention_that_drops_runs_at_the_published_share_of_its_rate() -> None:
    for backward, share in ((False, 0.80), (True, 0.65)):
        plain = Work("attention", flops=1e15, seq=4096, dtype="bfloat16", backward=backward)
        drops = replace(plain, drops=True)
        assert seconds(plain, TOY) / seconds(drops, TOY) == pytest.approx(share, rel=1e-3)


def test_attention_of_eight_bit_operands_is_so_many_times_as_fast() -> None:
    shape = msgspec.structs.replace(TOY.device.attention, eight_bit_forward=1.5, eight_bit_backward=1.2)
    profile = msgspec.structs.replace(TOY, device=msgspec.structs.replace(TOY.device, attention=shape))
    for backward, gain in ((False, 1.5), (True, 1.2)):
        wide = Work("attention", flops=1e12, seq=4096, dtype="bfloat16", backward=backward)
        narrow = Work("attention", flops=1e12, seq=4096, dtype="mxfp8", backward=backward)
        assert seconds(wide, profile) == pytest.approx(gain * seconds(narrow, profile))


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(SpecError, match="no matmul curve"):
        seconds(Work("matmul", m=1, n=1, k=1, dtype="nvfp4"), TOY)


def test_collectives_inside_a_domain() -> None:
    group = CommGroup(8, 8)
    assert seconds(Work("all_gather", bytes=8e9, group=group), TOY) == pytest.approx(7e9 / 100e9)
    assert seconds(Work("all_reduce", bytes=8e9, group=group), TOY) == pytest.approx(14e9 / 100e9)
    assert seconds(Work("all_to_all", bytes=8e9, group=CommGroup(1, 1)), TOY) == 0.0


def test_collectives_over_domains_are_bounded_by_the_nics() -> None:
    """16 ranks on two nodes: a gather's ring brings 15 of 16 parts of the buffer in, an eighth by each NIC;
    half of an all-to-all."""
    group = CommGroup(16, 8)
    fast, slow = machine(scale_up=1000), machine(scale_up=50)
    assert seconds(Work("all_gather", bytes=16e9, group=group), fast) == pytest.approx(15e9 / 8 / 10e9)
    assert seconds(Work("all_gather", bytes=16e9, group=group), slow) == pytest.approx(14e9 / 50e9)
    assert seconds(Work("all_to_all", bytes=16e9, group=group), TOY) == pytest.approx(8e9 / 10e9)


def test_in_a_mesh_a_group_has_the_links_to_its_own() -> None:
    """700 GB/s are 7 links of 100, one to each peer: a pair uses one, four ranks three, all eight seven."""
    toy = machine(scale_up=700)
    mesh = msgspec.structs.replace(toy, scale_up=msgspec.structs.replace(toy.scale_up, topology="mesh"))
    for kind in ("all_gather", "reduce_scatter", "all_to_all"):
        for n, rate in ((2, 100e9), (4, 300e9), (8, 700e9)):
            work = Work(kind, bytes=8e9, group=CommGroup(n, n))
            assert seconds(work, mesh) == pytest.approx(8e9 * (n - 1) / n / rate)
            assert seconds(work, toy) == pytest.approx(8e9 * (n - 1) / n / 700e9)
    pair, far = CommGroup(8, 8), CommGroup(2, 1)
    assert seconds(Work("send_recv", bytes=1e9, group=pair), mesh) == pytest.approx(1e9 / 100e9)
    assert seconds(Work("send_recv", bytes=1e9, group=far), mesh) == pytest.approx(1e9 / 10e9)
    within = Work(
        "all_gather", bytes=4e9, group=CommGroup(4, 2)
    )  # a link against 4e9 / 2 * 3 / 4 over a NIC of 10 GB/s
    assert seconds(within, mesh) == pytest.approx(max(2e9 / 100e9, 1.5e9 / 10e9))


@pytest.mark.parametrize(
    ("name", "link"), [("mi300x-192g", 64e9), ("mi325x-256g", 64e9), ("mi355x-288g", 76.8e9)]
)
def test_amd_cards_reach_no_more_than_their_links(name: str, link: float) -> None:
    profile = load_profile(name)
    assert profile.scale_up.peak.si == pytest.approx(7 * link)
    for n in (2, 4, 8):
        for kind in ("all_gather", "all_to_all"):
            rate = 64e9 * (n - 1) / n / seconds(Work(kind, bytes=64e9, group=CommGroup(n, n)), profile)
            assert 0.6 * (n - 1) * link < rate < (n - 1) * link
    rate = 64e9 / seconds(Work("send_recv", bytes=64e9, group=CommGroup(2, 2)), profile)
    assert 0.6 * link < rate < link


def test_spans_follow_the_rank_lists() -> None:
    assert span(range(16), 8) == CommGroup(16, 8, block=8)
    assert span([0, 8, 16, 24], 8) == CommGroup(4, 1, block=1)
    assert span([0, 4, 8, 12], 8) == CommGroup(4, 2, block=8)


def test_transfers_share_the_link() -> None:
    shared = msgspec.structs.replace(TOY, host=msgspec.structs.replace(TOY.host, link_sharing=4))
    assert seconds(Work("h2d", bytes=1e9), TOY) == pytest.approx(1e9 / 50e9)
    assert seconds(Work("d2h", bytes=1e9), shared) == pytest.approx(1e9 / 12.5e9)


def test_corrections_scale_and_add_per_op() -> None:
    fixed = msgspec.structs.replace(
        TOY,
        corrections={"memory_bound": Correction(scale=2.0, overhead=1e-3, tag="calibrated", source="test")},
    )
    work = Work("memory_bound", bytes=1e9, launches=3)
    assert seconds(work, fixed) == pytest.approx(2 * raw_seconds(work, TOY) + 3e-3)


def test_gradients_reach_the_buffer_of_a_reduction_at_its_kernels_rate() -> None:
    """torch's _chunk_cat, bf16 to fp32 (pytorch pull request 120678), however fast the memory is."""
    fast = load_profile("b200-sxm-192g")
    copied = Work("memory_bound", bytes=6e9, chunked=1e9)
    assert raw_seconds(copied, fast) == pytest.approx(1e9 / 2.78e11, rel=1e-3)
    assert raw_seconds(copied, fast) > raw_seconds(replace(copied, chunked=0.0), fast)
    assert raw_seconds(copied, TOY) == raw_seconds(replace(copied, chunked=0.0), TOY)


def test_an_oversubscribed_spine_slows_what_crosses_it() -> None:
    """64 ranks in 8 domains, 2 domains a leaf, 4:1: a quarter for 6 of 7 all-to-all bytes."""
    plain = machine()

    def time(kind: str, leaf: int, choices: int = 0) -> float:
        out = msgspec.structs.replace(plain.scale_out, oversubscription=4.0, domains_per_leaf=leaf)
        profile = msgspec.structs.replace(plain, scale_out=out)
        work = Work(kind, bytes=64e9, group=CommGroup(64, 8, choices))
        return seconds(work, profile) / seconds(work, plain)

    assert time("all_to_all", 2) == pytest.approx(4 * 6 / 7)
    assert time("all_to_all", 2, choices=8) == pytest.approx(4 * 6 / 7)
    assert time("all_gather", 2) == pytest.approx(2)  # one of two domains of a leaf sends outside
    assert time("all_gather", 4) == 1
    assert time("all_to_all", 8) == 1  # rail-optimised: all of them under one leaf


@pytest.mark.parametrize(("experts", "choices"), [(8, 2), (8, 5), (12, 4)])
@pytest.mark.parametrize("places", [1, 2, 4])
def test_a_row_reaches_the_ranks_that_have_its_experts(experts: int, choices: int, places: int) -> None:
    """Counted over every way to choose. An unknown number of experts is as good as very many."""
    each = experts // places
    chosen = list(combinations(range(experts), choices))
    there = sum(any(expert < each for expert in row) for row in chosen)
    assert float(reached(places, choices, experts)) == pytest.approx(there / len(chosen))
    assert float(reached(places, choices, 0)) == pytest.approx(reached(places, choices, 10**6), rel=1e-4)
    for share in (float(reached(places, many / 8, experts)) for many in range(8, 8 * experts)):
        assert 0 < share <= 1


@pytest.mark.parametrize(("groups", "limited", "choices"), [(4, 2, 3), (4, 1, 2), (2, 1, 2), (4, 3, 4)])
@pytest.mark.parametrize("places", [1, 2, 4, 8])
def test_a_row_of_some_groups_reaches_fewer_ranks(
    groups: int, limited: int, choices: int, places: int
) -> None:
    """Counted over every way to choose groups of 16 experts, and experts of these."""
    size, each = 16 // groups, 16 // places
    chosen = [
        row
        for some in combinations(range(groups), limited)
        for row in combinations([group * size + i for group in some for i in range(size)], choices)
    ]
    there = sum(any(expert < each for expert in row) for row in chosen)
    assert float(reached(places, choices, 16, (groups, limited))) == pytest.approx(there / len(chosen))
    assert there / len(chosen) <= float(reached(places, choices, 16)) + 1e-12
    assert float(reached(places, choices, 16, (groups, groups))) == float(reached(places, choices, 16))


@pytest.mark.parametrize(("experts", "choices"), [(8, 2), (8, 5), (12, 4), (32, 6), (256, 8)])
@pytest.mark.parametrize("places", [1, 2, 4])
def test_consecutive_experts_lie_on_few_ranks(experts: int, choices: int, places: int) -> None:
    """Counted over the rows of a round robin, and never more than of independent choices."""
    each = experts // places
    met = [len({(i * choices + j) % experts // each for j in range(choices)}) for i in range(experts)]
    found = float(reached(places, choices, experts, consecutive=True))
    assert found == pytest.approx(sum(met) / len(met) / places)
    assert found <= float(reached(places, choices, experts)) + 1e-12


def test_a_programs_own_balanced_routing_says_where_a_tokens_experts_lie() -> None:
    strategy = fsdp2(8, expert_parallel=4)
    strategy = replace(strategy, experts=replace(strategy.experts, token_dispatcher="deepep"))
    times = {}
    for routes in ("independent", "consecutive"):
        stack = Stack(name="mine", balanced_routes=routes, sharding=Sharding(fsdp=True))
        for routing in ("balanced", "forced", "zipf:0.5"):
            training = TrainSpec(seq_len=4096, global_batch=8, routing=routing)
            (program,) = lower(small(), strategy, training, 8, stack).programs
            sent = [work for op in program.ops for work in op.work if work.kind == "all_to_all"]
            times[routes, routing] = sum(seconds(work, TOY) for work in sent)
    assert times["consecutive", "forced"] < times["independent", "forced"]
    assert times["independent", "forced"] == times["consecutive", "balanced"]
    assert times["consecutive", "zipf:0.5"] == times["independent", "zipf:0.5"]


def test_a_deduplicated_exchange_sends_a_row_to_each_of_its_ranks_once() -> None:
    """Two different experts of eight, one on each rank: 2 x 7/8 of the copies leave their rank."""
    work = Work("all_to_all", bytes=8e9, group=CommGroup(8, 8, 2, 8))
    assert seconds(work, TOY) == pytest.approx(2 * 7 / 8 * 4e9 / 100e9)


@pytest.mark.parametrize("ranks", [4, 8, 16, 32])
def test_the_closed_form_of_a_deduplicated_exchange_is_what_is_simulated(ranks: int) -> None:
    work = Work("all_to_all", bytes=8e9, group=CommGroup(ranks, min(ranks, 8), 6, 64))
    some = np.array([float(ranks), 1.0])
    message = Message("all_to_all", np.full(2, 8e9), some, 1.0, 1.0, np.array([6.0, 0.0]), 64)
    found = np.add(*Wires(TOY, 32).seconds(message))
    assert found.tolist() == [pytest.approx(seconds(work, TOY)), 0.0]


def test_only_the_network_between_domains_is_oversubscribed() -> None:
    up = msgspec.structs.replace(machine().scale_up, oversubscription=2.0)
    with pytest.raises(SpecError, match=r"scale_up.oversubscription: 2.0 must be 1"):
        msgspec.structs.replace(machine(), scale_up=up)
