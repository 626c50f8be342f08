"""Bounds of programs that wait, or copy, as the families' own stacks do not."""

import numpy as np
import pytest

from mopsim.engine import simulate
from mopsim.search.driver import search
from mopsim.search.facts import SpaceFacts
from mopsim.search.options import Options
from mopsim.search.problem import Problem
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack
from mopsim.spec.training import TrainSpec
from tests.sim.spaces import spread
from tests.sim.test_search import holds
from tests.software import changed


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("llama3_8b", {"whole_sums": "always", "stays": "always"}),
        ("qwen3_30b_a3b", {"whole_sums": "always"}),
    ],
)
def test_what_waits_for_the_last_microbatch_is_bounded_once(name: str, entries: dict[str, str]) -> None:
    """Gathers, copies, and what crosses the host link, on a card whose memory is fast."""
    model, machine = load_model(name), load_profile("b200-sxm-192g")
    training = TrainSpec(seq_len=1024, global_batch=64)
    asked = Problem(model, machine, 1, training, stack=changed("torchtitan", sharding=entries))
    space = spread(asked, "fsdp2")
    facts, c = SpaceFacts.of(space), space.columns
    rows = np.flatnonzero((c["micro_batch"] <= 2) & (c["recompute"] == 0) & (c["experts"] == 1))
    for index in rows[:: max(1, len(rows) // 8)]:
        holds(space, facts, index, simulate(model, machine, 1, space.build(index), training, asked.stack))


def test_rows_padded_by_a_loop_over_experts_are_bounded_by_the_fewest_experts() -> None:
    model, machine = load_model("qwen3_30b_a3b"), load_profile("h100-sxm-80g")
    training, stack = TrainSpec(seq_len=1024, global_batch=64), load_stack("kempnerforge")
    space = spread(Problem(model, machine, 1, training, stack=stack), "fsdp2")
    facts, c = SpaceFacts.of(space), space.columns
    for index in np.flatnonzero((c["experts"] == 8) & (c["micro_batch"] <= 2))[::8]:
        holds(space, facts, index, simulate(model, machine, 1, space.build(index), training, stack))


def test_strategies_of_another_family_are_searched_on_a_stack_of_flat_units() -> None:
    """Their layers' backward has other parts than that of flat units."""
    model, machine = load_model("olmoe_1b_7b"), load_profile("h100-sxm-80g")
    asked = Problem(
        model, machine, 1, TrainSpec(seq_len=1024, global_batch=64), stack=load_stack("mopexec-flat")
    )
    assert search(asked, Options(("fsdp2",), budget=4)).best is not None
