"""Bounds by the layers of a candidate's own program: at most what is simulated, and close to it."""

from functools import cache
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mopsim import strategies
from mopsim.common.errors import SpecError
from mopsim.cost import seconds
from mopsim.engine import SimResult, simulate
from mopsim.program.builder import Builder
from mopsim.program.context import make_context
from mopsim.program.lower import passes_of
from mopsim.search import staged
from mopsim.search.bound import Bounder, bound
from mopsim.search.facts import SpaceFacts
from mopsim.search.guess import guess, likely
from mopsim.search.least import least_time
from mopsim.search.pieces import LayerPiece, Pieces, PipelinePart
from mopsim.search.pool import Pool
from mopsim.search.problem import DEFAULTS, DEVICE, Problem
from mopsim.search.refined import Refined
from mopsim.search.space import Space
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stack import AttentionKernel, Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Precision
from mopsim.spec.training import TrainSpec
from mopsim.strategies import megatron
from tests.property.drawn import mixed
from tests.sim.spaces import candidates, spread

CASES = (
    ("tiny", "cpu-2core", 2, 1024, 8),
    ("olmoe_1b_7b", "h200-sxm-141g", 1, 4096, 16),
    ("qwen3_30b_a3b", "h100-sxm-80g", 2, 8192, 64),
    ("mop_120b", "h200-sxm-141g", 2, 131072, 16),
    ("gpt_oss_20b", "b200-sxm-192g", 1, 8192, 32),
    ("deepseek_v2", "h100-sxm-80g", 4, 4096, 128),
    ("qwen3_30b_a3b", "mi300x-192g", 2, 8192, 32),
    ("mixed", "h200-sxm-141g", 2, 8192, 32),
    ("nemotron_3_nano_30b_a3b", "h100-sxm-80g", 2, 8192, 64),
    ("glm5_2", "gb200-186g", 16, 8192, 256),
)
"""Networks with and without windows, latents and dense layers, at places of their own; a CPU, and cards."""
PLAIN = (Phase.explicit, Phase.reuse, Phase.generate)
"""Without shrinking, whose examples are simulations."""
FAMILIES = ("mop", "fsdp2", "zero_offload", "megatron")


@cache
def problem(case: int, attention: AttentionKernel | None = None) -> Problem:
    """attention: the kernel of `mopexec-fsdp2`, in place of a family's own stack."""
    model, hardware, nodes, seq_len, batch = CASES[case]
    spec = mixed(24) if model == "mixed" else load_model(model)
    training = TrainSpec(seq_len=seq_len, global_batch=batch)
    stack = load_stack("mopexec-fsdp2") if attention else None
    if stack and attention:
        stack = replace(stack, kernels=replace(stack.kernels, attention={"default": attention}))
    return Problem(spec, load_profile(hardware), nodes, training, stack=stack)


@cache
def all_kinds(case: int, family: str) -> tuple[Space, SpaceFacts, Pieces]:
    space = spread(problem(case), family)
    return space, SpaceFacts.of(space), Pieces(space)


WHOLE = pytest.mark.xdist_group("whole spaces of megatron")


@cache
def whole(
    case: int, family: str, attention: AttentionKernel | None = None
) -> tuple[Space, SpaceFacts, Pieces]:
    """60,000 rows. Which those are is told by the layers of fewer of them than a search makes."""
    with patch.object(staged, "KNOWN", 100):
        space, _ = candidates(problem(case, attention), family, most=60_000)
    return space, SpaceFacts.of(space), Pieces(space)


def played(one: Problem, space: Space) -> SimResult | None:
    try:
        return simulate(one.model, one.hardware, one.num_nodes, space.build(0), one.training, space.stack)
    except SpecError:  # which a search counts as rejected
        return None


SPREAD = {one: pytest.mark.xdist_group(f"kinds of {one}") for one in FAMILIES}


@pytest.mark.parametrize("family", [pytest.param(one, marks=SPREAD[one]) for one in FAMILIES])
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow], phases=PLAIN)
@given(case=st.integers(0, len(CASES) - 1), place=st.floats(0, 1, exclude_max=True))
def test_a_refined_bound_is_at_most_what_is_simulated(case: int, family: str, place: float) -> None:
    space, shared, pieces = all_kinds(case, family)
    index = int(place * len(space))
    at = np.array([index])
    row, (closer, _) = space.take(at), Refined.of(pieces, shared, [at])
    found = played(problem(case), row)
    if found is None or closer is None:
        return
    before = Bounder(row, shared).all()
    assert max(before.time[0], closer.time()[0]) <= found.step_time * (1 + 1e-9)
    assert max(before.device[0], closer.device_memory()[0][0]) <= found.peak_memory + 1  # as in Pool
    assert before.host[0] <= found.host_memory + 1


@SPREAD["megatron"]
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow], phases=PLAIN)
@given(case=st.integers(1, len(CASES) - 1), place=st.floats(0, 1, exclude_max=True))
def test_a_strategys_bound_is_that_of_its_row(case: int, place: float) -> None:
    space, shared, pieces = all_kinds(case, "megatron")
    at = np.array([int(place * len(space))])
    row, (closer, _) = space.take(at), Refined.of(pieces, shared, [at])
    found = played(problem(case), row)
    if found is None or closer is None:
        return
    least = least_time(problem(case), found.strategy)
    assert least == pytest.approx(closer.time()[0], rel=1e-9)
    assert 0 < least <= found.step_time * (1 + 1e-9)


def test_a_strategy_that_no_row_builds_has_no_bound() -> None:
    asked = problem(2)
    software = asked.software("megatron")
    for strategy, bounded in (
        (megatron(16, expert_parallel=8), True),
        (megatron(16, pipeline_parallel=2, stage_layers=(1, 47)), False),
        (megatron(16, expert_parallel=8, token_dispatcher="allgather"), False),
    ):
        assert (least_time(asked, software.resolve(strategy)) > 0) is bounded


TINY = load_model("tiny")
NETWORKS = {
    "as it is": TINY,
    "with dropout": replace(TINY, dropout=0.1, total_params=None, active_params=None),
    "whose MTP layer is like none before it": replace(
        TINY, num_nextn_predict_layers=1, sliding_window=64, total_params=None, active_params=None
    ),
    "whose layers differ": replace(
        TINY,
        num_hidden_layers=6,
        mlp_only_layers=(2, 4),
        sliding_window=64,
        total_params=None,
        layer_types=(*["full_attention", "sliding_attention"] * 2, *["sliding_attention"] * 2),
    ),
}


STACKS = ("mopexec-split", "megatron-bridge-graph", "deepspeed")
PROGRAMS = {"mop": (*STACKS, "torchtitan"), "megatron": (*STACKS, "simumax", "megatron-deepspeed")}
BOUNDED = [
    (network, family, stack)
    for way, family in enumerate(PROGRAMS)
    for program, stack in enumerate(PROGRAMS[family])
    for kind, network in enumerate(NETWORKS)
    if (way + program + kind) % 2 == 0
]
"""Half of what they make: every network in every family, and under each of STACKS in one of the two."""


def with_wide_sums(stack: Stack) -> Stack:
    """The stack, its gradients in fp32: what a microbatch's leave beside them counts (kept_grads.py)."""
    kept = stack.sharding.microbatch_grads == "kept"
    return replace(stack, dtypes=replace(stack.dtypes, grad="float32", reduce="float32")) if kept else stack


@pytest.mark.parametrize(("network", "family", "stack"), BOUNDED)
def test_bounds_are_those_of_the_stack_that_runs_the_plan(network: str, family: str, stack: str) -> None:
    model, machine = NETWORKS[network], load_profile("h200-sxm-141g")
    training = TrainSpec(seq_len=2048, global_batch=32)
    program = with_wide_sums(load_stack(stack))
    if family == "mop":  # a fork with its loss
        program = replace(program, has={**program.has, "vocabulary.loss": ("ring",)})
    hold(Problem(model, machine, 1, training, stack=program), family)


def hold(asked: Problem, family: str, state: int | None = None) -> None:
    """Five bounds of a family's space, or of its rows whose optimizer's state is there."""
    space = spread(asked, family)
    if state is not None:
        space = space.take(np.flatnonzero(np.asarray(space.columns["state"]) == state))
    shared, pieces = SpaceFacts.of(space), Pieces(space)
    for index in np.random.default_rng(0).choice(len(space), 5, replace=False):
        at = np.array([index])
        row, (closer, _) = space.take(at), Refined.of(pieces, shared, [at])
        found = played(asked, row)
        if found is None or closer is None:
            continue
        before = Bounder(row, shared).all()
        assert max(before.time[0], closer.time()[0]) <= found.step_time * (1 + 1e-9)
        assert closer.device_memory()[0][0] <= found.peak_memory + 1
        assert before.host[0] <= found.host_memory + 1


def narrow(*_: object, keep_master: bool) -> Precision:
    """Parameters and moments in bf16, where the families have them wide."""
    one: Literal["bfloat16"] = "bfloat16"
    return Precision(param=one, reduce=one, grad=one, moments=one, master=one if keep_master else "param")


@pytest.mark.parametrize("adamw", ["fused", "foreach"])
def test_an_update_of_narrow_state_is_bounded_as_it_is_played(adamw: Any) -> None:
    """On a card on which a step is its update above all."""
    machine, program = load_profile("h200-sxm-141g"), load_stack("generic-fused")
    slow = replace(machine.device.adam_rate, value=machine.device.adam_rate.value / 10_000)
    machine = replace(machine, device=replace(machine.device, adam_rate=slow))
    program = replace(program, kernels=replace(program.kernels, adamw=adamw))
    asked = Problem(TINY, machine, 1, TrainSpec(seq_len=512, global_batch=8), stack=program)
    with patch.object(strategies, "_low_precision", narrow):
        hold(asked, "mop", DEVICE)


@pytest.mark.parametrize(
    ("family", "time", "memory"),
    [("fsdp2", 0.85, 0.8), pytest.param("megatron", 0.75, 0.9, marks=WHOLE)],
)
def test_refined_bounds_are_close(family: str, time: float, memory: float) -> None:
    """Shares of what is simulated, by mean, by the closer of both bounds: closed forms reach 0.5 of the time
    and of the memory here. Attention, which is bounded exactly, is FlashAttention-2's for fsdp2."""
    slow: AttentionKernel | None = None if family == "megatron" else "flash2"
    space, shared, pieces = whole(2, family, slow) if slow else whole(2, family)
    times, peaks = [], []
    for index in np.linspace(0, len(space) - 1, 12).astype(int).tolist():
        at = np.array([index])
        row, (closer, _) = space.take(at), Refined.of(pieces, shared, [at])
        found = played(problem(2, slow), row)
        if found is None or closer is None:
            continue
        times.append(max(Bounder(row, shared).time()[0], closer.time()[0]) / found.step_time)
        peaks.append(closer.device_memory()[0][0] / found.peak_memory)
    assert np.mean(times) >= time
    assert np.mean(peaks) >= memory


def test_what_shares_layers_is_refined_together() -> None:
    space, _ = candidates(problem(1), "fsdp2")
    pool = Pool.of(space, bound(space), np.arange(len(space)))
    assert pool.refine(0)
    assert not pool.refine(0)
    mine = pool.alike[pool.group[0]]
    assert pool.refined[mine].all()
    assert pool.refined.sum() == len(mine)
    again = Pieces(space.take(np.array([1, int(pool.rows[0])])))
    assert again.layers(1) is pool.pieces.layers(int(pool.rows[0])), "made once for a problem"


def test_layers_of_other_node_counts_have_groups_of_their_own() -> None:
    """64 ranks take one domain of 72, and 80 two halves, over which groups of 16 spread."""
    model, machine = load_model("qwen3_30b_a3b"), load_profile("gb200-186g")

    def layer(nodes: int) -> LayerPiece:
        training = TrainSpec(seq_len=4096, global_batch=320)
        asked = Problem(model, machine, nodes, training)
        row = {name: np.array([value]) for name, value in (DEFAULTS | {"experts": 16}).items()}
        made = Pieces(Space("megatron", asked, row)).layers(0)
        assert made is not None
        return next(iter(made.values()))

    assert (layer(16).forward.out > 0, layer(20).forward.out > 0) == (False, True)


def _woven(space: Space, count: int, least: int = 1) -> list[int]:
    """Rows whose forwards and backwards are woven, of at least so many stages, spread over a space."""
    c = space.columns
    rows = np.flatnonzero((c["overlap"] == 1) & (c["pipeline"] >= least))
    return [int(one) for one in rows[np.linspace(0, len(rows) - 1, count).astype(int)]]


@WHOLE
@pytest.mark.parametrize("woven", [False, True])
def test_what_is_expected_of_known_parts_is_what_is_simulated(woven: bool) -> None:
    """Step times of candidates whose parts are known, of the twentieth that is guessed to be fastest: within
    3 % in the median, and three in four within 6 %."""
    space, shared, pieces = whole(5, "megatron")
    fast = np.argsort(guess(space), kind="stable")[: len(space) // 20]
    if woven:
        fast = fast[(space.columns["overlap"][fast] == 1) & (space.columns["pipeline"][fast] >= 3)]
    every = fast[np.linspace(0, len(fast) - 1, 16).astype(int)].tolist()
    misses = []
    for index in every:
        at = np.array([index])
        row, (closer, _) = space.take(at), Refined.of(pieces, shared, [at])
        found = played(problem(5), row)
        if found is None or closer is None:
            continue
        assert bool(closer.ranked[0]) >= woven
        misses.append(abs(float(likely(closer)[0]) / found.step_time - 1))
    assert len(misses) > 4
    assert np.median(misses) < 0.03
    assert np.quantile(misses, 0.75) < 0.06


@WHOLE
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], phases=PLAIN)
@given(case=st.sampled_from((2, 5)), place=st.floats(0, 1, exclude_max=True), flat=st.booleans())
def test_bounds_of_a_woven_pipeline_are_at_most_what_is_simulated(
    case: int, place: float, flat: bool
) -> None:
    space, shared, pieces = whole(case, "megatron")
    rows = _woven(space, 1000, 1 if flat else 3)
    index = rows[int(place * len(rows))]
    at = np.array([index])
    closer, _ = Refined.of(pieces, shared, [at])
    found = played(problem(case), space.take(at)) if closer is not None else None
    if found is not None and closer is not None:
        assert closer.time()[0] <= found.step_time * (1 + 1e-9)
        assert closer.device_memory()[0][0] <= found.peak_memory + 1


@WHOLE
def test_the_memory_of_a_woven_pipeline_is_known() -> None:
    """What a first pair needs is nearly what the step does: 0.95 of it by mean."""
    space, shared, pieces = whole(5, "megatron")
    shares = []
    for index in _woven(space, 8):
        at = np.array([index])
        row, (closer, _) = space.take(at), Refined.of(pieces, shared, [at])
        found = played(problem(5), row)
        if found is not None and closer is not None:
            shares.append(closer.device_memory()[0][0] / found.peak_memory)
    assert len(shares) > 4
    assert np.mean(shares) > 0.95


@WHOLE
def test_passes_are_woven_as_the_program_weaves_them() -> None:
    """The seconds that the ops of the program's builder take, one after the other on each stream."""
    space, _, pieces = whole(2, "megatron")
    index = _woven(space, 3)[1]
    strategy, one = space.build(index), problem(2)
    on, domain = one.hardware.device.architecture, one.hardware.scale_up_size
    context = make_context(one.model, strategy, one.training, domain, space.stack, on)
    passes, issue = passes_of(context), Builder(context.groups)
    ready: tuple[int, ...] = ()
    for layer in (0, 1, 2):
        ready = issue.play(passes.forward(layer), layer, ready)
    middle, ready = len(issue.ops), ()
    for layer in (2, 1):
        ready = issue.play(passes.backward(layer), layer, ready)
    issue.weave(0, middle)
    ends: list[float] = []
    last: dict[str, float] = {}
    for op in issue.ops:
        start = max([last.get(op.stream, 0.0), *(ends[dep] for dep in op.deps)])
        ends.append(start + sum(seconds(work, space.machine) for work in op.work))
        last[op.stream] = ends[-1]
    kinds = [one.model.layer_kind(layer) for layer in (0, 1, 2)]
    found = pieces.woven(index, PipelinePart(tuple(kinds)), PipelinePart((kinds[2], kinds[1])))
    assert issue.ops[0].stream == "compute"
    assert found.chain == pytest.approx(last["compute"], rel=1e-12)
