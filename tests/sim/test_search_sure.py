"""What a candidate needs to fit as surely as is asked, and how long exchanges beside others take: at most
what is simulated, and close to it."""

from typing import Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mopsim.common.errors import SpecError
from mopsim.engine import SimResult, simulate
from mopsim.intervals.memory import PeakSpread, on_top
from mopsim.intervals.spread import SURE, Spread
from mopsim.search.facts import SpaceFacts, surely
from mopsim.search.hosts import surely_on_host
from mopsim.search.pieces import Pieces
from mopsim.search.pool import STEP
from mopsim.search.problem import DEFAULTS, HOST, RING, STREAMED, Problem
from mopsim.search.refined import Refined
from mopsim.search.space import Space
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.training import TrainSpec
from tests.property.drawn import mixed
from tests.sim.spaces import spread

CASES = (
    ("tiny", "cpu-2core", 2, 1024, 8),
    ("qwen3_30b_a3b", "h100-sxm-80g", 2, 8192, 64),
    ("mop_120b", "h200-sxm-141g", 2, 131072, 16),
    ("deepseek_v2", "h100-sxm-80g", 4, 4096, 128),
    ("mixed", "h200-sxm-141g", 2, 8192, 32),
)
"""With and without dense layers and windows, a CPU, and cards."""
ONE = np.array([0])


def problem(case: int) -> Problem:
    model, hardware, nodes, seq_len, batch = CASES[case]
    spec = mixed(24) if model == "mixed" else load_model(model)
    return Problem(spec, load_profile(hardware), nodes, TrainSpec(seq_len=seq_len, global_batch=batch))


def played(row: Space, queues: Literal["each", "one"] | None = None) -> SimResult | None:
    one, stack = row.problem, row.stack
    if queues:
        stack = replace(stack, host=replace(stack.host, queues={"default": queues}))
    try:
        return simulate(one.model, one.hardware, one.num_nodes, row.build(0), one.training, stack)
    except SpecError:  # which a search counts as rejected
        return None


@pytest.mark.parametrize("family", ["mop", "fsdp2", "zero_offload", "megatron"])
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow],
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)  # fmt: skip
@given(case=st.integers(0, len(CASES) - 1), place=st.floats(0, 1, exclude_max=True))
def test_what_is_surely_needed_is_at_most_what_is(family: str, case: int, place: float) -> None:
    space = spread(problem(case), family)
    row = space.take(np.array([int(place * len(space))]))
    shared, pieces = SpaceFacts.of(row), Pieces(row)
    found, (closer, _) = played(row), Refined.of(pieces, shared, [ONE])
    if found is None or closer is None:
        return
    host, device = (one.quantile(SURE) for one in (found.host, found.device.as_described))
    assert surely_on_host(pieces, shared, ONE)[0] <= host * (1 + 1e-5) + 1
    least = float(closer.device_memory()[0][0])
    wires = np.floor(float(closer.communicators()[0]) / least / STEP)
    assert least * surely(row, STEP * wires) <= device * (1 + 1e-5) + 1


def long_sequences(**columns: int) -> Space:
    """A row of 1T parameters on 96 cards at 1M tokens, whose state is on the host."""
    training = TrainSpec(seq_len=2**20, global_batch=96)
    one = Problem(load_model("mop_1t"), load_profile("h200-sxm-141g"), 12, training)
    row = DEFAULTS | {
        "micro_batch": 1, "sequence": 32, "experts": 8, "expert_shard": 12, "dense_shard": 96, "chunks": 4,
        "vocabulary": 8, "loss": RING, "state": STREAMED,
    } | columns  # fmt: skip
    return Space("mop", one, {name: np.array([value], dtype=np.int64) for name, value in row.items()})


@pytest.mark.parametrize("state", [STREAMED, HOST])
@pytest.mark.parametrize("inputs", [0, 1])
def test_what_is_surely_needed_of_the_host_is_known(state: int, inputs: int) -> None:
    row = long_sequences(state=state, boundary_host=inputs)
    found = played(row)
    assert found is not None
    needed = surely_on_host(Pieces(row), SpaceFacts.of(row), ONE)[0]
    assert needed == pytest.approx(found.host.quantile(SURE), rel=0.02)


@pytest.mark.parametrize("experts", [4, 8, 24])
def test_exchanges_of_tokens_run_beside_those_of_weights(experts: int) -> None:
    """They share links across nodes with gathers and reductions, 1.9 to 2.8 % of these steps, which bounds
    leave out. They leave out as well what starts late in a program of one queue."""
    row = long_sequences(experts=experts, expert_shard=96 // experts)
    found, (closer, _) = played(row), Refined.of(Pieces(row), SpaceFacts.of(row), [ONE])
    assert found is not None
    assert closer is not None
    assert 0.97 * found.step_time <= closer.time()[0] <= found.step_time
    queued = played(row, queues="one")
    assert queued is not None
    assert queued.step_time >= closer.time()[0]


@given(probability=st.floats(0.01, 1), tensors=st.floats(1e6, 1e12), above=st.floats(0, 1e11))
def test_a_share_of_what_comes_on_top_is_enough(probability: float, tensors: float, above: float) -> None:
    known = PeakSpread(tensors, above, Spread(0.0, 0.0))
    enough = tensors + on_top(probability) * above
    assert known.quantile(probability) == pytest.approx(enough, rel=1e-5)
