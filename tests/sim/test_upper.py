"""What may come on top of the tensors, by hand, and what it makes of the probability of fitting."""

import dataclasses

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from mopsim.common.errors import SpecError
from mopsim.engine import SimResult, simulate, upper
from mopsim.program.context import make_context
from mopsim.program.dispatcher import buffers
from mopsim.program.pinned import power_of_two
from mopsim.program.workload import CommGroup, Work, collective_work
from mopsim.report.tables import DRY_RUN, dry_run_only
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.presets import load_model
from mopsim.spec.sharding import Sharding
from mopsim.spec.stack import Kernels, Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Dispatcher
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron, mop
from tests.sim.toys import machine, quantity, small

GIB = 2**30


def test_pinned_blocks_are_those_of_the_published_run() -> None:
    """arXiv 2609.14306, table 12: 21 boundaries, 7.83 GiB of tensors, 10.5 GiB pinned."""
    boundary = round(7.83 * GIB / 21)
    assert 21 * power_of_two(boundary) / GIB == 10.5
    assert upper.host({"boundaries": 21 * boundary}, {"boundaries": 4 / 3, "other": 1.0}) == {
        "pinned blocks": pytest.approx(21 * boundary / 3, abs=1), "process": upper.PROCESS,
    }  # fmt: skip


@given(st.integers(1, 2**50))
def test_a_power_of_two_less_than_doubles(size: int) -> None:
    block = power_of_two(size)
    assert size <= block < 2 * size
    assert block & (block - 1) == 0


def test_the_causes_add_up_by_hand() -> None:
    """100 GB of tensors: 5 of copies, 6 % of the sum in blocks, 1 of communicators."""
    found = upper.device(10**11, 5 * 10**9, 10**9)
    assert found["allocator"] == pytest.approx(0.06 * 105e9)
    assert sum(found.values()) == pytest.approx(5e9 + 6.3e9 + 1e9)
    assert "copies" not in upper.device(10**11, 0, 0)


def test_blocks_around_gathered_logits_are_of_the_rank_that_has_them() -> None:
    """10 GB of logits of two bytes: 40 GB of blocks, less by what the fullest rank has above the last
    stage; none where that has its peak elsewhere."""
    gathered, peak = 5 * 10**9, 10**11
    assert upper.around_logits(gathered, peak, peak) == 8 * gathered
    assert upper.around_logits(gathered, peak, peak - 10**10) == 8 * gathered - 10**10
    assert (
        upper.around_logits(gathered, peak, peak - 5 * 10**10) == upper.around_logits(gathered, peak, 0) == 0
    )
    assert upper.device(peak, 0, 0, 8 * gathered)["logits"] == 8 * gathered


@pytest.mark.parametrize(
    ("stack", "tensor"), [("aleph-scaling", 2), ("aleph-scaling", 1), ("megatron-lm", 2)]
)
def test_whole_logits_have_blocks_where_ranks_gather_them(stack: str, tensor: int) -> None:
    strategy = replace(megatron(8, tensor_parallel=tensor, recompute="full"), stack=stack)
    model = small(vocab_size=2**16)
    training = TrainSpec(seq_len=1024, global_batch=32 // tensor, routing="balanced")
    result = simulate(model, machine(), 1, strategy, training)
    assert result.peak_component == "vocabulary"
    gathers = stack == "aleph-scaling" and tensor > 1
    assert result.above_peak.get("logits", 0) == gathers * 8 * 1024 * 2**16


def test_every_group_of_ranks_has_one_communicator() -> None:
    eight, four = CommGroup(8, 8), CommGroup(4, 4)
    works = [
        collective_work("all_gather", 10.0, eight), collective_work("all_to_all", 10.0, eight),
        collective_work("all_to_all", 20.0, eight), collective_work("all_reduce", 10.0, four),
        collective_work("all_gather", 10.0, CommGroup(1, 1)), collective_work("send_recv", 10.0, four),
        Work("matmul", m=1, n=1, k=1),
    ]  # fmt: skip
    assert upper.communication(works) == (2 * 688 + 544) * 2**20 + 3.28e9
    assert upper.communication(works[:1]) == 688 * 2**20


def test_a_dispatcher_with_buffers_of_its_own_has_no_exchange_of_nccl() -> None:
    eight, two = CommGroup(8, 8), CommGroup(2, 2)
    works = [collective_work("all_to_all", 10.0, group) for group in (eight, two)]
    assert upper.communication(works, (eight, 10**9)) == 10**9 + 544 * 2**20 + round(3.28e9 / 7)
    uneven = [collective_work("all_to_all", 10.0, CommGroup(8, 8, choices=11.1)), works[1]]
    assert upper.communication(uneven, (eight, 10**9)) == upper.communication(works, (eight, 10**9))


@pytest.mark.parametrize(
    ("dispatcher", "ranks", "expected"),
    [
        ("alltoall", 8, None), ("hybridep", 8, 8 * 4096 * (4096 + 4 * 128 + 4 * 16)),
        ("deepep", 8, 10 * 8 * 256 * (4096 + 2056)),
        ("deepep", 32, 10 * (8 * 288 + 2 * 128 * 4) * (4096 + 2056)),
    ],
)  # fmt: skip
def test_buffers_of_a_dispatcher_by_hand(dispatcher: Dispatcher, ranks: int, expected: int | None) -> None:
    """Qwen3-30B-A3B, 4,096 tokens a rank of 2,048 numbers and 128 experts."""
    plan = megatron(32, expert_parallel=ranks, token_dispatcher=dispatcher)
    job = TrainSpec(seq_len=4096, global_batch=32)
    context = make_context(load_model("qwen3_30b_a3b"), plan, job, 8, load_stack("megatron-bridge-hybridep"))
    found = buffers(context)
    assert (found and found[1]) == expected


def test_sends_through_the_network_share_a_buffer() -> None:
    """16 ranks on two nodes; a stage that sends to the next; a sum, which sends to no one rank."""
    far = CommGroup(16, 8)
    exchange, stage, total = (
        collective_work(kind, 10.0, group)
        for kind, group in (("all_to_all", far), ("send_recv", CommGroup(2, 1)), ("all_reduce", far))
    )
    assert upper.communication([exchange]) == 688 * 2**20 + 3.28e9 + 512 * 2**20
    assert upper.communication([stage]) == (544 + 512) * 2**20
    assert upper.communication([total]) == 688 * 2**20


def test_a_process_is_what_time_printed() -> None:
    """GNU time prints its "kbytes" by 1024 bytes."""
    assert upper.host({}, {"other": 1.0}) == {"process": 2_056_600 * 1024}


def played(hardware: HardwareProfile, name: str = "mop") -> SimResult:
    strategy = {
        "mop": lambda: mop(8, context_parallel=2, expert_parallel=4, vocab_parallel=8, offload_inputs=True),
        "fsdp2": lambda: fsdp2(8, expert_parallel=4, recompute="full"),
        "megatron": lambda: megatron(8, tensor_parallel=2, expert_parallel=4),
    }[name]()
    return simulate(small(), hardware, 1, strategy, TrainSpec(seq_len=512, global_batch=8))


def with_device(limit: int) -> HardwareProfile:
    toy = machine()
    return msgspec.structs.replace(
        toy, device=msgspec.structs.replace(toy.device, memory=quantity(limit, "B"))
    )


@pytest.mark.parametrize("name", ["mop", "fsdp2", "megatron"])
def test_the_verdict_is_a_probability(name: str) -> None:
    """It falls as the device shrinks; tensors that are counted to the byte leave what comes on top alone."""
    result = played(machine(), name)
    assert result.facts.exact == (name != "megatron")
    above = result.peak_memory + sum(result.above_peak.values())
    limits = [2 * above, above, round(result.device.quantile(0.9)), round(result.device.quantile(0.5)), 10**6]
    chances = [played(with_device(limit), name).p_fits for limit in limits]
    assert chances == sorted(chances, reverse=True)
    assert (chances[2], chances[3], chances[4]) == (
        pytest.approx(0.9, abs=1 / 64), pytest.approx(0.5, abs=1 / 64), 0.0,
    )  # fmt: skip
    assert chances[1] > (0.98 if result.facts.exact else 0.5)
    assert played(with_device(limits[2] + 1), name).sure
    assert not played(with_device(limits[3]), name).sure
    assert played(with_device(result.peak_memory - 1), name).verdict == "out of memory"


def test_peaks_known_by_a_dry_run_alone_are_said_to_be() -> None:
    card = msgspec.structs.replace(machine(), device_kind="cuda")
    step, other = (played(card, name) for name in ("fsdp2", "megatron"))
    assert step.to_json()["peak_memory_interval_against"] == "dry run"
    assert other.to_json()["peak_memory_interval_against"] == "runs"
    assert dry_run_only([step, step]) == f"memory: {DRY_RUN}."
    assert dry_run_only([other, step]) == f"memory of 2: {DRY_RUN}."
    assert dry_run_only([other]) == ""


def test_what_is_reserved_is_each_pool_at_its_own_highest() -> None:
    """Gradients fill theirs at the end of the backward, the rest is highest where there are none of them."""
    result = played(machine(), "fsdp2")
    high = result.highest_by_category
    beside = result.reserved_memory - result.peak_memory
    assert 0 < beside <= high["gathered"] + high["grads"]
    other = played(machine(), "megatron")
    assert other.reserved_memory == other.peak_memory


def test_what_a_traced_graph_gathers_lies_in_the_kernels_pool() -> None:
    strategy, training = fsdp2(2, dtype="bfloat16"), TrainSpec(seq_len=64, global_batch=2)
    apart, one = (
        simulate(
            small(), machine(), 1, strategy, training,
            Stack(name=str(pool), sharding=Sharding(fsdp=True, one_pool=pool)),
        )
        for pool in (False, True)
    )  # fmt: skip
    assert one.reserved_memory == one.peak_memory == apart.peak_memory < apart.reserved_memory


def test_idle_blocks_are_not_what_the_verdict_counts() -> None:
    """They are reserved, and given back where they are in the way."""
    result = played(machine(), "fsdp2")
    assert result.reserved_memory > result.peak_memory
    assert result.above_peak == upper.device(result.peak_memory, 0, result.above_peak["communication"])


def test_idle_blocks_are_given_back_before_memory_runs_out() -> None:
    """Of a device with half the room for them beside communicators, and of one with none."""
    result = played(machine(), "fsdp2")
    half = (result.reserved_memory - result.peak_memory) // 2
    wires = result.above_peak["communication"]
    for room in (half, 0, -1, -wires, -wires - 1):
        tight = played(with_device(result.peak_memory + wires + room), "fsdp2")
        assert tight.fits == (room >= -wires)
        assert tight.reserved_memory == tight.peak_memory + max(0, room)


def test_logits_that_were_cast_stay_a_block() -> None:
    """Too small for what torch's loss makes of the copy."""
    strategy, training = fsdp2(2, dtype="bfloat16"), TrainSpec(seq_len=1024, global_batch=2)
    stacks = [
        Stack(name=str(held), kernels=Kernels(logits_held=held), sharding=Sharding(fsdp=True))
        for held in (True, False)
    ]
    held, freed = (
        simulate(small(vocab_size=65536), machine(), 1, strategy, training, stack) for stack in stacks
    )
    assert held.peak_component == freed.peak_component == "vocabulary"
    assert held.peak_memory - freed.peak_memory == 1024 * 65536 * 2
    assert held.reserved_memory == freed.reserved_memory


def test_an_interval_holds_its_level() -> None:
    result = played(machine(), "megatron")
    narrow, wide = result.step_time_interval(0.5), result.step_time_interval(0.95)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    found = result.to_json(0.5)
    assert found["step_time_interval_s"] == list(narrow)
    assert found["peak_memory_interval_bytes"] == list(result.peak_memory_interval(0.5))
    assert found["p_fits"] == result.p_fits
    with pytest.raises(SpecError, match=r"interval: 1\.5 must"):
        result.step_time_interval(1.5)


def test_the_host_alone_may_be_too_small() -> None:
    result = played(machine())
    most = result.host_memory + sum(result.above_host.values())
    assert dataclasses.replace(result, host_limit=most).p_host == 1.0
    tight = dataclasses.replace(result, host_limit=(result.host_memory + most) // 2)
    assert tight.p_host == pytest.approx(0.5, abs=0.07)
    assert not tight.sure


def test_what_pinned_blocks_take_is_the_programs() -> None:
    """mopexec has torch pin what it asks for; the papers' program takes powers of two (`rounding`)."""
    strategy = mop(8, context_parallel=2, expert_parallel=4, vocab_parallel=8, offload_inputs=True)
    step = TrainSpec(seq_len=512, global_batch=8)
    asked, rounded = (
        simulate(small(), machine(), 1, msgspec.structs.replace(strategy, stack=stack), step).above_host
        for stack in ("mopexec-flat", "mop-papers")
    )
    assert list(asked) == ["process"]
    assert rounded["pinned blocks"] > 0


@pytest.mark.parametrize("name", ["mop", "fsdp2"])
def test_a_cpu_is_held_to_its_live_tensors(name: str) -> None:
    result = played(msgspec.structs.replace(machine(), device_kind="cpu"), name)
    assert result.above_peak == {}
    assert result.above_host == {}
