"""The search: legal candidates, bounds that hold, pruning that loses nothing, and a result when nothing
fits."""

import itertools
import time
from dataclasses import replace
from functools import cache

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mopsim.common.errors import SpecError
from mopsim.engine import SimResult, simulate
from mopsim.search import Options, SearchResult, search
from mopsim.search.bound import Bounder, bound
from mopsim.search.facts import SpaceFacts
from mopsim.search.pool import Pool
from mopsim.search.problem import Problem
from mopsim.search.result import TIE
from mopsim.search.space import IN_8_BITS, Space
from mopsim.spec.capability import runnable
from mopsim.spec.hardware import HardwareProfile, Quantity
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.routing import worst
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import MatmulDType
from mopsim.spec.training import TrainSpec
from mopsim.strategies import FAMILIES
from tests.sim.spaces import generate, spread

CASES = (
    ("tiny", "cpu-2core", 1, 512, 4, "float32"),
    ("tiny", "cpu-2core", 2, 1024, 8, "float64"),
    ("olmoe_1b_7b", "h200-sxm-141g", 1, 4096, 16, "bfloat16"),
    ("qwen3_30b_a3b", "h100-sxm-80g", 2, 8192, 32, "bfloat16"),
    ("mop_120b", "h200-sxm-141g", 2, 131072, 16, "bfloat16"),
    ("qwen3_30b_a3b", "mi300x-192g", 2, 8192, 32, "bfloat16"),
    ("gpt3_5b", "h100-sxm-80g", 2, 2048, 64, "bfloat16"),
)


def problem(case: int) -> Problem:
    model, hardware, nodes, seq_len, batch, precision = CASES[case]
    spec = load_model(model)
    training = TrainSpec(seq_len=seq_len, global_batch=batch)
    return Problem(spec, load_profile(hardware), nodes, training, precision)  # type: ignore[arg-type]


def with_memory(hardware: HardwareProfile, device: float, host: float | None = None) -> HardwareProfile:
    """The same machine with other memory sizes, bytes."""

    def size(value: float) -> Quantity:
        return Quantity(value=value, unit="B", tag="assumed", source="test")

    replace = msgspec.structs.replace
    new = replace(hardware, device=replace(hardware.device, memory=size(device), reserved=size(0)))
    return new if host is None else replace(new, host=replace(new.host, memory=size(host)))


@cache
def whole(case: int, family: str) -> tuple[Space, SpaceFacts]:
    """A family's space, and what bounds its rows."""
    space = spread(problem(case), family)
    return space, SpaceFacts.of(space)


def holds(space: Space, facts: SpaceFacts, index: int, found: SimResult) -> None:
    """The bounds of a row are at most what is simulated; `bound` says the same of the whole space."""
    bounds = Bounder(space.part(index, index + 1), facts).all()
    assert bounds.time[0] <= found.step_time * (1 + 1e-9)
    assert bounds.device[0] <= found.peak_memory + 1
    assert bounds.host[0] <= found.host_memory + 1


BOUNDED = pytest.mark.parametrize(
    "family",
    [pytest.param(one, marks=pytest.mark.xdist_group(f"bounded {one}")) for one in sorted(FAMILIES)],
)
"""Tests that look at the same spaces stay in one worker."""


@BOUNDED
@settings(max_examples=40 // len(FAMILIES), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=st.integers(0, len(CASES) - 1), place=st.floats(0, 1, exclude_max=True))
def test_bound_is_at_most_what_is_simulated(case: int, family: str, place: float) -> None:
    given_problem = problem(case)
    space, facts = whole(case, family)
    index = int(place * len(space))
    strategy = space.build(index)
    try:
        found = simulate(
            given_problem.model, given_problem.hardware, given_problem.num_nodes, strategy,
            given_problem.training,
        )  # fmt: skip
    except SpecError as refused:  # which the search counts as rejected
        if refused.field != "strategy.optimizer.bucket_params":
            raise
        return
    holds(space, facts, index, found)


@pytest.mark.parametrize("stack", ["deepspeed", "universal-llm-trainer"])
def test_gradients_that_live_from_the_first_backward_are_bounded(stack: str) -> None:
    """Of pipelines too, in which all are there only when fewer microbatches are under way."""
    model, machine = load_model("mixtral_8x7b"), load_profile("h100-sxm-80g")
    training = TrainSpec(seq_len=4096, global_batch=16)
    asked = Problem(model, machine, 2, training, stack=load_stack(stack))
    space = spread(asked, "megatron")
    facts = SpaceFacts.of(space)
    for index in np.random.default_rng(0).choice(len(space), 12, replace=False):
        holds(space, facts, index, simulate(model, machine, 2, space.build(index), training, asked.stack))


@BOUNDED
def test_rows_are_bounded_alike_alone_and_in_their_space(family: str) -> None:
    space, facts = whole(2, family)
    bounds = bound(space)
    for index in np.linspace(0, len(space) - 1, 20).astype(int):
        alone = Bounder(space.part(index, index + 1), facts).all()
        assert (alone.time[0], alone.device[0], alone.host[0]) == (
            bounds.time[index], bounds.device[index], bounds.host[index],
        )  # fmt: skip


NARROW = (
    ("h100-sxm-80g", "fp8", "qwen3_30b_a3b"),
    ("b200-sxm-192g", "mxfp8", "llama3_8b"),
    ("gb300-288g", "nvfp4", "qwen3_30b_a3b"),
    ("mi300x-192g", "fp8", "llama3_8b"),
)


@cache
def cast(narrow: tuple[str, MatmulDType, str], family: str) -> tuple[Space, SpaceFacts]:
    """A family's space whose products are cast, and what bounds its rows."""
    spec, training = load_model(narrow[2]), TrainSpec(seq_len=4096, global_batch=64)
    asked = Problem(spec, load_profile(narrow[0]), 2, training, narrow[1])
    space = spread(asked, family)
    return space, SpaceFacts.of(space)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    narrow=st.sampled_from(NARROW),
    family=st.sampled_from(IN_8_BITS),
    place=st.floats(0, 1, exclude_max=True),
)
def test_bounds_hold_where_products_are_cast(
    narrow: tuple[str, MatmulDType, str], family: str, place: float
) -> None:
    space, facts = cast(narrow, family)
    index = int(place * len(space))
    strategy, asked = space.build(index), space.problem
    assert strategy.precision.matmul == narrow[1]
    holds(space, facts, index, simulate(asked.model, asked.hardware, 2, strategy, asked.training))


def test_products_in_8_bits_are_faster_and_not_in_every_family() -> None:
    model, hardware = load_model("llama3_8b"), load_profile("b200-sxm-192g")
    training = TrainSpec(seq_len=4096, global_batch=64)

    def asked(families: tuple[str, ...], precision: MatmulDType) -> SearchResult:
        options = Options(families, budget=3)
        return search(Problem(model, hardware, 1, training, precision), options)

    wide, narrow = (asked(("megatron",), precision).best for precision in ("bfloat16", "mxfp8"))
    assert wide is not None
    assert narrow is not None
    assert narrow.step_time < wide.step_time
    refused = asked(("mop",), "mxfp8")
    assert refused.best is None
    assert "mop: has no products in mxfp8" in refused.rejected


@BOUNDED
@pytest.mark.parametrize("case", range(len(CASES)))
def test_every_generated_row_is_a_legal_strategy(case: int, family: str) -> None:
    given_problem = problem(case)
    space, _ = whole(case, family)
    assert len(space)
    for index in np.linspace(0, len(space) - 1, 40).astype(int):
        strategy = space.build(int(index))
        strategy.check_model(given_problem.model)
        given_problem.training.check_strategy(strategy)


@pytest.mark.parametrize("family", ["mop", "fsdp2", "zero_offload"])
def test_families_are_run_by_mopexec(family: str) -> None:
    space = generate(problem(0), family)
    for index in range(0, len(space), max(1, len(space) // 50)):
        assert runnable(space.build(index), space.problem.model) is None


def test_megatron_is_not_run_and_says_why() -> None:
    space = generate(problem(0), "megatron")
    reason = runnable(space.build(0), space.problem.model)
    assert reason is not None
    assert str(reason).startswith("stack: 'megatron-core' is a stack that mopexec does not run, only ")
    assert "mopsim search --stack NAME --runnable plans for one of them" in str(reason)


def test_search_without_a_budget_finds_the_best_of_all() -> None:
    """Pruning loses nothing: the winner of an exhausted search ties with the fastest of every simulated
    candidate that fits with room to spare."""
    p = problem(0)
    hardware = with_memory(p.hardware, 70e6)
    found = search(replace(p, hardware=hardware), Options(("zero_offload",), budget=10_000))
    assert found.proven
    space = generate(replace(p, hardware=hardware), "zero_offload")
    times = []
    for index in range(len(space)):
        result = simulate(p.model, hardware, 1, space.build(index), p.training)
        if result.sure:
            times.append(result.step_time)
    assert found.best is not None
    assert min(times) <= found.best.step_time <= min(times) * (1 + TIE)


@pytest.mark.parametrize(
    ("options", "memory"),
    [
        (Options(("fsdp2",), budget=10), None),
        (Options(("fsdp2", "mop", "zero_offload"), budget=8), 70e6),
        (Options(("mop", "megatron"), budget=4), None),
        (Options(("mop",), budget=15), 2e6),
        (Options(("mop",), budget=15, any_routing=True), 30e6),
    ],
)
def test_counts_add_up(options: Options, memory: float | None) -> None:
    """Every candidate is ranked or rejected for one reason."""
    p = problem(0)
    hardware = p.hardware if memory is None else with_memory(p.hardware, memory)
    found = search(replace(p, hardware=hardware), options)
    assert sum(found.rejected.values()) + len(found.top) == found.candidates
    assert all(count > 0 for count in found.rejected.values())
    assert found.simulated <= options.budget * len(options.families)
    for faster, slower in itertools.pairwise(found.top):
        assert faster.step_time <= slower.step_time * (1 + TIE)


def test_families_side_by_side_find_the_same() -> None:
    """Also where one finds nothing that fits, and is held against the best of the other."""
    p = problem(2)
    hardware = with_memory(p.hardware, 5.6e9)
    one, two = (
        search(replace(p, hardware=hardware), Options(("mop", "megatron"), budget=2, jobs=jobs))
        for jobs in (1, 2)
    )
    told = [
        {key: value for key, value in found.to_json().items() if "seconds" not in key} for found in (one, two)
    ]
    assert told[0] == told[1]
    assert one.best is not None
    assert one.best_by_family["mop"] is None
    assert one.lacking.keys() == {"mop"}
    mine = one.lacking["mop"]
    assert sum(mine.rejected.values()) == mine.candidates < one.candidates
    assert all(count <= one.rejected[reason] for reason, count in mine.rejected.items())
    told_of = one.to_json()["lacking"]
    assert isinstance(told_of, dict)
    assert told_of["mop"]["rejected"] == mine.rejected


def test_nothing_fits_is_a_result_that_says_what_stops_it() -> None:
    p = problem(0)
    hardware = with_memory(p.hardware, 2e6)
    found = search(replace(p, hardware=hardware), Options(("mop",), budget=30))
    assert found.best is None
    assert found.closest is not None
    assert found.closest.over is not None
    assert "nothing fits" in found.verdict()
    for gap, left in ((None, True), (0.0, False)):
        found.gap = gap
        assert found.verdict().endswith("(not exhausted: a plan left out may fit)") is left
    written = found.to_json()
    assert written["best"] is None
    assert written["top"] == []
    assert isinstance(written["closest"], dict)


def test_a_plan_may_be_asked_to_fit_any_routing() -> None:
    """Each ranked plan fits with every token sent to one rank of its expert-parallel groups."""
    p = problem(0)
    options = Options(("mop",), budget=60, risk=True, any_routing=True)
    hardware = with_memory(p.hardware, 34e6)
    found = search(replace(p, hardware=hardware), options)
    for one in found.top:
        routing = worst(p.model, one.strategy.experts.expert_parallel)
        training = msgspec.structs.replace(p.training, routing=routing)
        assert simulate(p.model, hardware, 1, one.strategy, training).fits
    assert found.top
    assert found.rejected["does not fit where the router sends all tokens to one rank"] > 0


def test_host_memory_rules_out_offloading() -> None:
    p = problem(0)
    hardware = with_memory(p.hardware, 1e9, host=2e6)
    found = search(replace(p, hardware=hardware), Options(("zero_offload",)))
    assert found.best is None
    assert found.rejected["host memory, bound"] == found.bounded > 0


def test_only_what_mopexec_runs_if_asked() -> None:
    model, hardware = load_model("olmoe_1b_7b"), load_profile("h200-sxm-141g")
    training = TrainSpec(seq_len=4096, global_batch=64)
    found = search(Problem(model, hardware, 1, training, runnable=True), Options(("megatron",), budget=3))
    assert found.simulated == 0
    assert "is a stack that mopexec does not run" in found.verdict()
    anyway = search(Problem(model, hardware, 1, training), Options(("megatron",), budget=1))
    assert anyway.simulated == 1


def test_more_memory_never_makes_the_best_slower() -> None:
    p = problem(0)
    best = []
    for memory in (50e6, 80e6, 1e9):
        options = Options(("zero_offload",), budget=10_000)
        found = search(replace(p, hardware=with_memory(p.hardware, memory)), options)
        best.append(found.best.step_time if found.best else float("inf"))
    assert best == sorted(best, reverse=True)


def test_bounds_cost_microseconds() -> None:
    """Two seconds of the CPU for what takes about half of one: a hundred thousand candidates and more."""
    p = problem(4)
    p.known.clear()
    started = time.process_time()
    space = generate(p, "mop")
    bound(space)
    assert len(space) > 100_000
    assert (time.process_time() - started) / len(space) < 2e-5


def test_neighbours_differ_in_one_decision() -> None:
    space = generate(problem(0), "mop")
    pool = Pool.of(space, bound(space), np.arange(len(space)))
    mine = space.row(int(pool.rows[7]))
    together = {"expert_shard": "experts", "bucket": "state", "beside": "state"}
    for position in pool.neighbours(7):
        other = space.row(int(pool.rows[position]))
        assert len({together.get(name, name) for name in mine if mine[name] != other[name]}) == 1


def long_problem(host: float) -> Problem:
    """One sequence of 8K over the machine's ranks, whose host has `host` bytes for all of them."""
    p = problem(0)
    training = TrainSpec(seq_len=8192, global_batch=p.hardware.devices_per_node)
    hardware = with_memory(p.hardware, 1e9, host=host)
    return Problem(p.model, hardware, 1, training, p.precision)


def test_a_part_of_the_boundaries_goes_where_all_do_not_fit() -> None:
    """The host budget is searched where the host is small; rows beyond the host are rejected, not all."""
    p = long_problem(24e6)
    space = generate(p, "mop")
    parts = set(space.columns["boundary_parts"].tolist())
    assert parts == {1, 2, 3, 4}
    found = bound(space)
    rows = np.flatnonzero((space.columns["boundary_host"] == 1) & (space.columns["state"] == 0))
    whole = {}
    for index in rows[:400].tolist():
        row = space.row(index)
        strategy = space.build(index)
        each = space.tokens()[index] * p.model.hidden_size * 4
        budget = strategy.activations.host_budget
        count = p.model.num_hidden_layers if budget == 0 else budget // each
        assert count == max(1, p.model.num_hidden_layers * row["boundary_parts"] // 4)
        assert found.host[index] == pytest.approx(count * each)
        whole.setdefault(row["boundary_parts"], index)
    for index in whole.values():
        result = simulate(p.model, p.hardware, 1, space.build(index), p.training)
        assert found.host[index] <= result.host_memory
        assert found.device[index] <= result.peak_memory
        assert found.time[index] <= result.step_time


def test_a_large_host_is_not_asked_for_parts() -> None:
    assert set(generate(long_problem(1e12), "mop").columns["boundary_parts"].tolist()) == {4}
