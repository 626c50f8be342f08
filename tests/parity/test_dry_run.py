"""A dry run's memory is that of real training, to the byte, by category and tier."""

import re
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mopexec.check.dry_run import dry_run, quadratic_guard
from mopexec.measure.scope import category, component
from mopexec.measure.tracker import OutOfMemory
from mopsim.common.errors import MopError, SpecError
from mopsim.spec.presets import load_model
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, mop
from tests.exec.spawn import Pool
from tests.parity.memory_cases import WIDE
from tests.parity.memory_cases import trained as plans
from tests.plans import plan_of, split

SAME = (
    "peak_memory_bytes", "memory_by_category_bytes", "peak_at", "resident_memory_bytes",
    "resident_by_category_bytes", "host_memory_bytes", "host_memory_by_category_bytes",
)  # fmt: skip


pytestmark = pytest.mark.xdist_group("dry runs")


@cache
def planned(world: int, name: str, rank: int = 0) -> dict[str, Any]:
    """A dry run of a case that is trained, for all tests."""
    return dry_run(plans(world)[name], rank).to_json()


@cache
def trained(world: int) -> list[dict[str, Any]]:
    """What the tracker of each rank saw in real training, by case."""
    ranks = Pool(world, prompt=True)  # of their own: nothing is cached by other tests
    found = ranks.run("tests.parity.memory_worker", "track", world)
    ranks.close()
    return found


CASES = [(world, name) for world in (2, 4) for name in plans(world)]


@pytest.mark.parametrize(("world", "name"), CASES)
def test_a_dry_run_is_real_training_to_the_byte(world: int, name: str) -> None:
    """The first rank and the last."""
    for rank in (0, world - 1):
        dry, real = planned(world, name, rank), trained(world)[rank][name]
        assert {key: dry[key] for key in SAME} == {key: real[key] for key in SAME}, f"rank {rank}"


TIERS = ("mop", "mop_budget", "mop_host_update", "zero_offload", "fsdp2", "fsdp2_offload", "fsdp2_boundaries")
"""The cases that differ in what is on the host."""


def test_a_gpu_in_the_machine_that_plans_changes_nothing(monkeypatch):
    for name in TIERS:
        world = 4 if name in WIDE else 2
        here = planned(world, name)
        with monkeypatch.context() as patched:
            patched.setattr(torch.cuda, "is_available", lambda: True)
            there = dry_run(plans(world)[name]).to_json()
        assert {key: there[key] for key in SAME} == {key: here[key] for key in SAME}


def test_limits_are_held_at_the_allocation_that_crosses_them():
    plan = plans(4)["mop"]
    free = dry_run(plan)
    assert (
        dry_run(plan, device_limit=free.peak_memory, host_limit=free.host_memory).peak_memory
        == free.peak_memory
    )
    with pytest.raises(OutOfMemory) as device:
        dry_run(plan, device_limit=free.peak_memory - 1)
    assert (device.value.tier, device.value.component, device.value.phase) == (
        "device", free.peak_component, free.peak_phase,
    )  # fmt: skip
    with pytest.raises(OutOfMemory, match="host memory: "):
        dry_run(plan, host_limit=free.host_memory - 1)
    assert not dist.is_initialized()


def test_a_rank_outside_the_world_is_refused():
    with pytest.raises(SpecError, match="rank: 4 must lie between 0 and 3"):
        dry_run(plans(4)["mop"], rank=4)


TINY = load_model("tiny")


@pytest.mark.parametrize(
    ("length", "strategy"),
    [(512, mop(1)), (1024, mop(2, vocab_parallel=2)), (2048, fsdp2(1)), (1024, split(2, tensor_parallel=2))],
    ids=["gates", "half the words", "words", "words of a tensor rank"],
)
def test_widths_that_equal_the_sequence_are_no_attention(length: int, strategy: Strategy) -> None:
    dry_run(plan_of(TINY, strategy, TrainSpec(seq_len=length, global_batch=2)))


@pytest.mark.parametrize(
    ("where", "what", "shape", "refused"),
    [
        ("attention", "activations", (2, 8, 1024, 1024), True),
        ("other", "activations", (1024, 1024), True),
        ("attention", "activations", (2, 8, 1024, 512), False),
        ("vocabulary", "logits", (1024, 1024), False),
        ("dense_ffn", "activations", (1024, 1024), False),
        ("other", "params", (1024, 1024), False),
    ],
)
def test_what_a_dry_run_takes_for_an_attention_matrix(
    where: str, what: str, shape: tuple[int, ...], refused: bool
) -> None:
    refuse = quadratic_guard(plan_of(TINY, mop(1), TrainSpec(seq_len=1024, global_batch=1)))
    assert refuse is not None
    said = f"attention: an op makes a tensor {shape}, sequence x sequence elements"
    how = pytest.raises(MopError, match=re.escape(said)) if refused else nullcontext()
    with component(where), category(what), how:
        refuse("an op", torch.empty(shape, device="meta"))


@pytest.mark.parametrize(
    ("strategy", "length"), [(mop(1), 256), (mop(1), 128), (split(2, tensor_parallel=2), 128)]
)
def test_a_width_of_attention_cannot_be_told_from_a_sequence(strategy: Strategy, length: int) -> None:
    """The network's, those of its keys, and of a rank's heads."""
    assert quadratic_guard(plan_of(TINY, strategy, TrainSpec(seq_len=length, global_batch=2))) is None
