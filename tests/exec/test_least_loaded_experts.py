"""Least-loaded experts with weights that move: equal to the single-device model, and to plain dispatch where
nothing moves; the peak of the dispatch against standard expert parallelism and against the plan.
"""

import random
from typing import Any

import pytest
import torch

from mopexec.check import dry_run
from mopexec.distributed.mesh import Group
from mopexec.distributed.tiers import Platform
from mopexec.measure.tracker import MemoryTracker
from mopexec.operators.least_loaded import _slots, placed
from mopexec.run.apply import build
from mopsim.engine import simulate
from mopsim.spec.placement import least_loaded
from mopsim.spec.plan import Plan
from mopsim.spec.strategy import Experts
from tests.exec.flat_plans import make_plan
from tests.exec.spawn import pool
from tests.exec.test_flat_units import ALL_FOUR, ALL_TWO, TOLERANCE
from tests.sim.toys import machine, small

CPU = Platform(torch.device("cpu"))
MOVING: dict[str, Any] = {"balance": "least_loaded", "min_rows": 1}
PARTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "two ranks, everything": (2, ALL_TWO, 2),
    "four ranks, chunked": (4, {"experts": {"expert_parallel": 4, "chunk_tokens": 5}}, 1),
    "four ranks, two groups, everything": (4, ALL_FOUR, 2),
}


def moving(base: dict[str, Any], **experts: Any) -> dict[str, Any]:
    return base | {"experts": base["experts"] | MOVING | experts}


@pytest.mark.parametrize(
    ("name", "routing", "dtype"),
    [(name, "95/4", "float64") for name in PARTS]
    + [("four ranks, two groups, everything", routing, "float64") for routing in ("learned", "balanced")]
    + [("two ranks, everything", "95/4", "float32")],
)
def test_it_equals_the_single_device_model(name: str, routing: str, dtype: str) -> None:
    """Loss, gradients, and weights after two clipped steps."""
    world, base, micro_batch = PARTS[name]
    how, stated = ("learned", {}) if routing == "learned" else ("profile", {"routing": routing})
    plan = make_plan(world, moving(base), dtype=dtype, micro_batch=micro_batch, training=stated)
    for worst in pool(world).run("tests.exec.flat_parity", "compare", plan, how):
        assert max(worst.values()) <= TOLERANCE[dtype], worst


@pytest.mark.parametrize("seed", range(6))
def test_every_rank_gets_the_rows_that_are_placed_with_it(seed: int) -> None:
    """Over all chunks, however a chunk's routes are spread; and what one sends another receives."""
    draw, size, experts, chunks = random.Random(seed), 4, 8, 5
    counts = [
        [[draw.choice([0, 1, 3, 40 * (e == 2)]) for e in range(experts)] for _ in range(chunks)]
        for _ in range(size)
    ]
    how = Experts(expert_parallel=size, balance="least_loaded", min_rows=1, capacity=1.0)
    totals = [sum(counts[r][i][e] for r in range(size) for i in range(chunks)) for e in range(experts)]
    placement = least_loaded(totals, size, how.capacity, how.min_rows, how.threshold)
    found = [placed(counts, Group(tuple(range(size)), place, None), how, CPU) for place in range(size)]
    slots = _slots(placement, experts // size, size)
    for place, of in enumerate(found):
        assert of is not None
        send, receive, arrived, _ = of
        assert arrived.tolist() == receive
        for e in range(experts):
            _, slot = slots.get((place, e), (place, None))
            rows = 0 if slot is None else sum(part[r][slot] for part in receive for r in range(size))
            assert rows == placement.rows[place].get(e, 0)
        width = len(send[0]) // size
        for other, theirs in enumerate(found):
            assert theirs is not None
            for i in range(chunks):
                assert send[i][other * width : (other + 1) * width] == theirs[1][i][place]


@pytest.mark.parametrize("chunk_tokens", [0, 5])
def test_where_nothing_moves_it_is_plain_dispatch_to_the_bit(chunk_tokens: int) -> None:
    base = {"experts": {"expert_parallel": 2, "chunk_tokens": chunk_tokens}}
    runs = [
        pool(2).run("tests.exec.flat_parity", "train", make_plan(2, changes))[0]
        for changes in (base, moving(base, threshold=2.5))
    ]
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())


class DispatchPeak(MemoryTracker):
    """Also the most bytes of the dispatch, whenever that is."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.most = max(self.most, self.current_by_category.get("dispatch", 0))
        return result


def peaks_of(plan: Plan, rank: int) -> tuple[int, int]:
    """Most bytes of the dispatch, and of all."""
    tracker = DispatchPeak(meta=True)
    with dry_run.fake_world(plan.strategy.world_size, rank), tracker:
        platform = Platform(torch.device("meta"), fake=True)
        build(plan, platform, routing="profile", seed=0).step(dry_run._batches(plan, platform))
    return tracker.most, tracker.peak_memory


def test_the_dispatch_of_chunks_peaks_below_standard_and_never_above_the_plan() -> None:
    """95 % of the tokens on 4 of 16 experts, four ranks: at most 0.45 of standard expert parallelism."""
    model = small(num_local_experts=16, num_experts_per_tok=4, num_hidden_layers=2, hidden_size=128)
    training = {"seq_len": 4096, "global_batch": 4, "routing": "95/4"}
    peaks = {}
    for name, experts in (("standard", {}), ("moved", {"chunk_tokens": 1024, "balance": "least_loaded"})):
        changes = {"experts": {"expert_parallel": 4, "min_rows": 256, **experts}}
        plan = make_plan(4, changes, dtype="bfloat16", model=model, training=training)
        most, whole = (max(found) for found in zip(*(peaks_of(plan, r) for r in range(4)), strict=True))
        peaks[name] = most
        result = simulate(model, machine(memory=1000), 1, plan.strategy, plan.training, timeline=True)
        planned = max(result.memory_curve_by_category["dispatch"])
        assert most <= 1.005 * planned, name
        assert result.peak_memory == pytest.approx(whole, rel=0.01), name
    assert peaks["moved"] <= 0.45 * peaks["standard"], peaks
