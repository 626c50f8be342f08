"""Collectives of gradients and parameters: as wide as what is sent, of no more blocks than they may have."""

from dataclasses import replace as part_of

import numpy as np
import pytest
from msgspec.structs import replace

from mopsim.cost.communication import CHANNEL, collective
from mopsim.program import lower
from mopsim.program.workload import CommGroup, Op, Work
from mopsim.search import SearchResult
from mopsim.search.bound import Bounder
from mopsim.search.facts import SpaceFacts
from mopsim.search.simulating import run_row
from mopsim.spec.profiles import load_profile
from mopsim.spec.strategy import MatmulDType
from mopsim.spec.training import TrainSpec
from mopsim.strategies import megatron
from tests.sim.megatron_jobs import deep
from tests.sim.spaces import candidates
from tests.sim.test_search import problem
from tests.software import changed

TRAINING = TrainSpec(seq_len=256, global_batch=8)


def _ops(stack: str, matmul: MatmulDType, name: str, **sharding: int) -> list[Op]:
    strategy = megatron(8)
    hidden = replace(strategy.overlap, grad_reduce=True, param_gather=True)
    strategy = replace(strategy, precision=replace(strategy.precision, matmul=matmul), overlap=hidden)
    program = lower(deep(), strategy, TRAINING, 8, changed(stack, sharding=sharding)).programs[0]
    return [op for op in program.ops if op.name == name]


def test_a_block_moves_so_many_bytes() -> None:
    card, ring = load_profile("gb300-288g"), CommGroup(8, 8)
    sent = Work("all_gather", bytes=8e9, group=ring, channels=8)
    assert collective(sent, card) == pytest.approx(7e9 / (8 * CHANNEL["blackwell"]))
    assert collective(replace(sent, channels=64), card) == collective(replace(sent, channels=0), card)
    both = Work("all_reduce", bytes=8e9, group=CommGroup(16, 8), channels=1)
    assert collective(both, card) == pytest.approx(15e9 / CHANNEL["blackwell"]), "there and back"
    older = load_profile("h100-sxm-80g")
    assert collective(sent, older) == collective(replace(sent, channels=0), older), "not measured there"


@pytest.mark.parametrize(
    ("stack", "matmul", "part"),
    [("megatron-bridge", "fp8", 1 / 2), ("megatron-bridge", "nvfp4", 9 / 32), ("megatron-bridge", "mxfp8", 1),
     ("megatron-core", "fp8", 1)],
)  # fmt: skip
def test_weights_that_are_casts_are_gathered_as_such(stack: str, matmul: MatmulDType, part: float) -> None:
    wide, sent = (_ops(stack, dtype, "gather parameters") for dtype in ("compute", matmul))
    shares = [one.work[0].bytes / two.work[0].bytes for one, two in zip(sent, wide, strict=True)]
    assert {round(share, 2) for share in shares} == {1.0, round(part, 2)}, "the embedding's is not cast"
    assert min(shares) == pytest.approx(part, rel=0.15)


def test_limited_collectives_do_not_queue_with_the_layers() -> None:
    for name in ("gather parameters", "reduce gradients"):
        plain, limited = (_ops("megatron-core", "compute", name, channels=many) for many in (0, 8))
        assert {op.stream for op in (*plain, *limited)} == {"state scale_up"}
        assert {op.work[0].channels for op in limited} == {8}


def test_bounds_of_limited_collectives_lie_below() -> None:
    stack = changed("megatron-core", sharding={"channels": 8})
    asked = part_of(problem(0), training=TrainSpec(seq_len=32, global_batch=16), stack=stack)
    space, _ = candidates(asked, "megatron")
    facts, seen = SpaceFacts.of(space), 0
    for row in np.arange(len(space))[:: max(1, len(space) // 12)].tolist():
        found = run_row(space, row, SearchResult(asked.model), count=False)
        if found is not None:
            seen += 1
            assert Bounder(space.part(row, row + 1), facts).all().time[0] <= found.step_time * (1 + 1e-9)
    assert seen > 4
