"""Predicted against tracked peaks of plans drawn from the wider space (`wide_plans`), of the rank with the
most to do: the last one where blocks of keys are joined."""

import pytest

from tests.parity.test_drawn_memory import agrees
from tests.parity.wide_plans import wide_plan

SEEDS = (0, 55, 72, 73, 82, 93, 109, 116, 132, 162, 192, 210, 212, 215, 233, 271, 325, 388, 483, 678)
"""Of buffers of what tensor-parallel ranks have whole (0, 55, 116), of experts whose rows are not whole 16
bytes (82), of routers of MTP layers (109), of experts that ranks split: alone on a rank, in layers that keep
everything, gathered again (162 to 233); of latents that a norm's backward follows (73) or that turn in fp32
(388), of gradients beside a ring (325), of shards' gradients beside what they are made from (212, 483), and
of several sequences that are exchanged (678); of experts one by one, of unequal rows (93), of shared experts'
gradients beside routed ones (271), of rows before the end of a tensor-parallel region (132), and of an
embedding that several MTP layers read (72)."""


@pytest.mark.parametrize("seed", SEEDS)
def test_peaks(seed: int) -> None:
    plan = wide_plan(seed)
    attention, last = plan.strategy.attention, plan.strategy.world_size - 1
    joined = attention.context_parallel > 1 and attention.cp_comm_type != "ulysses"
    agrees(plan, ranks=(last,) if joined else (0,))
