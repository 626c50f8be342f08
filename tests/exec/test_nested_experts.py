"""Experts under nested checkpoints: equal to the single-device model, and to the bit to those that send rows
again; what they run more, what they hold, and what the plan says of it.
"""

from typing import Any

import pytest
import torch
from msgspec.structs import replace

from mopsim.engine import simulate
from mopsim.spec.capability import runnable
from mopsim.spec.plan import Plan
from mopsim.spec.stacks import load_stack
from mopsim.strategies import fsdp2
from tests.exec.flat_plans import MODEL, make_plan
from tests.exec.kernel_counts import counted_step
from tests.exec.spawn import pool
from tests.exec.test_flat_units import ALL_FOUR, ALL_TWO
from tests.exec.test_least_loaded_experts import moving, peaks_of
from tests.sim.toys import machine, small
from tests.software import changed

NESTED = "mopexec-flat-nested"
WHOLE = replace(MODEL, moe_intermediate_size=16)
"""Rows of experts are whole 16 bytes, as grouped products want."""
ONE: dict[str, Any] = {"experts": {"chunk_tokens": 5}}
PARTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, ONE),
    "two ranks": (2, ALL_TWO),
    "two ranks, moved": (2, moving(ALL_TWO)),
    "four ranks": (4, ALL_FOUR),
    "four ranks, moved": (4, moving(ALL_FOUR)),
}


CASES = [(name, "95/4") for name in PARTS] + [(name, "balanced") for name in PARTS if "moved" not in name]


@pytest.mark.parametrize(("name", "routing"), CASES)
def test_they_equal_the_single_device_model(name: str, routing: str) -> None:
    """Loss, gradients, and weights after two clipped steps."""
    world, changes = PARTS[name]
    plan = make_plan(world, changes, training={"routing": routing}, stack=NESTED)
    for worst in pool(world).run("tests.exec.flat_parity", "compare", plan, "profile"):
        assert max(worst.values()) <= 1e-9, worst


@pytest.mark.parametrize(
    ("chunk_tokens", "moves", "kind"),
    [(0, False, "cpu"), (0, True, "cpu"), (5, True, "cpu"), (5, False, "cuda")],
)
def test_they_equal_experts_that_send_rows_again_to_the_bit(
    chunk_tokens: int, moves: bool, kind: str
) -> None:
    """Of one chunk and of several, expert by expert and by grouped products, by a router that learns."""
    base: dict[str, Any] = {"experts": {"expert_parallel": 2, "chunk_tokens": chunk_tokens}}
    how: dict[str, Any] = {"dtype": "bfloat16" if kind == "cuda" else "float32", "model": WHOLE}
    changes, runs = moving(base) if moves else base, []
    for stack in ("mopexec-flat", NESTED):
        plan = make_plan(2, changes, stack=stack, device_kind=kind, **how)
        runs.append(pool(2).run("tests.exec.flat_parity", "train", plan)[1])
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())


def launched(stack: str, kind: str) -> tuple[int, int, int]:
    """Products of a step, exchanges for each MoE layer and chunk, and how often products of experts begin."""
    changes = {"experts": {"expert_parallel": 2, "chunk_tokens": 8}}
    plan = make_plan(
        2, changes, dtype="bfloat16", model=WHOLE, device_kind=kind, stack=stack, training={"global_batch": 2}
    )
    seen, chunks = counted_step(plan).by_op, 2 * WHOLE.num_moe_layers
    if kind == "cuda":
        return seen["aten::_grouped_mm"], seen["c10d::alltoall_base_"] // chunks, chunks
    each = WHOLE.num_local_experts // 2
    return seen["aten::mm"], seen["c10d::alltoall_base_"] // chunks, chunks * each


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_products_run_three_times_and_rows_travel_twice(kind: str) -> None:
    """4 products more for each expert and chunk: 3 of the layer's recomputation and the third output. An
    exchange more for each chunk: results come home in the recomputation, where rows went again before."""
    (again, sent, rounds), (nested, kept, _) = (launched(one, kind) for one in ("mopexec-flat", NESTED))
    assert nested - again == 4 * rounds
    assert (sent, kept) == (5, 6)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_rows_of_all_chunks_are_held_as_planned(kind: str) -> None:
    """Experts that move, of the rank that holds most."""
    model = small(num_local_experts=16, num_experts_per_tok=4, num_hidden_layers=2, hidden_size=128)
    changes = {
        "experts": {"expert_parallel": 4, "chunk_tokens": 512, "balance": "least_loaded", "min_rows": 256}
    }
    peaks = []
    for stack in ("mopexec-flat", NESTED):
        plan: Plan = make_plan(
            4, changes, dtype="bfloat16", model=model, device_kind=kind, stack=stack,
            training={"seq_len": 4096, "global_batch": 4, "routing": "95/4"},
        )  # fmt: skip
        most, whole = (max(found) for found in zip(*(peaks_of(plan, r) for r in (0, 3)), strict=True))
        given = (model, machine(memory=1000), 1, plan.strategy, plan.training, plan.stack)
        result = simulate(*given, timeline=True)
        assert most == pytest.approx(max(result.memory_curve_by_category["dispatch"]), rel=0.02)
        assert whole == pytest.approx(result.peak_memory, rel=0.01)
        peaks.append(most)
    rows = 4096 * 4 * 128 * 2
    assert peaks[1] > peaks[0] + rows / 2


def test_only_what_a_stack_says_is_run() -> None:
    """By flat_units, not in autograd's order; elsewhere no experts are in chunks."""
    plan = make_plan(2, ALL_TWO, stack=NESTED)
    given = (plan.strategy, MODEL, plan.training)
    assert runnable(*given, stack=load_stack(NESTED)) is None
    refused = runnable(*given, stack=changed(NESTED, recompute={"chunk_inputs": "autograd"}))
    assert str(refused) == (
        "stack.recompute.chunk_inputs: 'autograd' is not run by flat_units, only 'redispatch' or 'nested'"
    )
    fsdp = changed("mopexec-fsdp2", recompute={"chunk_inputs": "nested"})
    assert runnable(fsdp2(2), MODEL, stack=fsdp) is None
