"""Each family is searched by itself; what a search leaves out is said; memory and time are learned."""

import dataclasses
import sys
from functools import cache

import numpy as np
import pytest
from msgspec.structs import replace

import mopsim
from mopsim.engine import SimResult, simulate
from mopsim.report.findings import finding
from mopsim.search import Options, SearchResult, search, staged
from mopsim.search.bound import bound
from mopsim.search.driver import NO_GAIN, NO_GAIN_IN_FAMILY, SPENT
from mopsim.search.had import had
from mopsim.search.learn import Effects, Memory, Rise, Slower, Times
from mopsim.search.pool import Pool
from mopsim.search.problem import EXCHANGES, Problem, worked_out
from mopsim.search.result import NOT_RUN, TIE
from mopsim.search.simulating import ranked
from mopsim.spec.capability import runnable
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.training import TrainSpec
from mopsim.strategies import FAMILIES
from tests.sim.spaces import candidates, generate
from tests.sim.test_search import with_memory

TINY, CPU = load_model("tiny"), load_profile("cpu-2core")
TRAINING = TrainSpec(seq_len=512, global_batch=4)
SHORT = TrainSpec(seq_len=512, global_batch=2)


def asked(
    families: tuple[str, ...], budget: int, memory: float = 70e6, training: TrainSpec = TRAINING
) -> SearchResult:
    options = Options(families, top=2, budget=budget)
    return search(Problem(TINY, with_memory(CPU, memory), 1, training, "float32"), options)


@cache
def alone(family: str) -> SimResult | None:
    return asked((family,), 4).best


def test_more_families_are_never_worse() -> None:
    """Also where the budget is spent: a family finds the same whoever is searched beside it."""
    found = asked(FAMILIES[::-1], 4)
    assert found.best_by_family.keys() == set(FAMILIES)
    for family in FAMILIES:
        mine, beside = alone(family), found.best_by_family[family]
        assert (mine is None) == (beside is None)
        if mine and beside and found.best:
            assert beside.strategy == mine.strategy
            assert ranked([mine, found.best])[0].step_time == found.best.step_time


def test_best_of_each_family_and_what_runs_are_in_the_json() -> None:
    found = asked(("mop", "megatron"), 8)
    written = found.to_json()
    best = written["best_by_family"]
    assert isinstance(best, dict)
    assert list(best) == ["mop", "megatron"]
    assert best["mop"]["runnable"] is True
    assert best["megatron"]["runnable"] is False
    assert written["gap"] == found.gap
    assert not found.proven
    assert "not exhausted" in found.exhausted()
    assert "expected" in found.exhausted()
    assert found.gap is not None
    assert written["expected_gap"] == found.expected_gap <= found.gap


def test_what_cannot_gain_is_not_said_to_be_untried() -> None:
    """Where the best is proven nothing is: neither what cannot beat its own family's best by more than a tie
    nor what may do that, but cannot beat the best of all."""
    alone, both = asked(("mop",), 40), asked(("mop", "fsdp2"), 40)
    assert not alone.proven
    assert (alone.rejected[NO_GAIN_IN_FAMILY] > 0, alone.rejected[SPENT] > 0) == (True, True)
    assert alone.rejected[NO_GAIN] == 0
    assert both.proven
    assert both.rejected[NO_GAIN] == alone.rejected[SPENT]
    assert both.rejected[NO_GAIN_IN_FAMILY] >= alone.rejected[NO_GAIN_IN_FAMILY]
    assert not any(reason.startswith("not tried") for reason in both.rejected)
    for found in (alone, both):
        assert sum(found.rejected.values()) + len(found.top) == found.candidates


@cache
def enumerated(family: str) -> list[SimResult]:
    """The third of a family's candidates whose bounds are lowest, and a quarter of the others, played."""
    space = generate(Problem(TINY, CPU, 1, SHORT, "float32"), family)
    rows = np.argsort(bound(space).time, kind="stable")
    third = len(rows) // 3
    played = [*rows[:third], *rows[third::4]]
    return [simulate(TINY, CPU, 1, space.build(int(index)), SHORT) for index in played]


WHOLE = [
    pytest.param(one, marks=pytest.mark.xdist_group(f"all of {one}")) for one in ("fsdp2", "zero_offload")
]


@pytest.mark.parametrize("family", WHOLE)
@pytest.mark.parametrize("memory", [40e6, 70e6])
def test_small_spaces_enumerated(family: str, memory: float) -> None:
    """The best of a small budget is the best of all, and the gap that it tells is not exceeded."""
    hardware = with_memory(CPU, memory)
    problem = Problem(TINY, hardware, 1, SHORT, "float32")
    assert len(generate(problem, family)) > 40
    limit = hardware.memory_limit()
    every = [one for one in enumerated(family) if dataclasses.replace(one, memory_limit=limit).sure]
    found = asked((family,), 40, memory, SHORT)
    if not every:
        assert found.best is None or not found.best.sure
        return
    fastest = min(one.step_time for one in every)
    assert found.best is not None
    assert found.gap is not None
    assert found.best.step_time <= fastest * (1 + TIE)
    seen = min(one.step_time for one in found.played if one.sure)  # the best but for ties
    assert fastest >= seen / (1 + found.gap) * (1 - 1e-9)


def test_a_search_is_deterministic() -> None:
    first = asked(("mop", "megatron"), 4)
    worked_out.cache_clear()
    second = asked(("mop", "megatron"), 4)
    assert [one.strategy for one in first.top] == [one.strategy for one in second.top]
    assert first.rejected == second.rejected


def test_memory_is_a_constant_and_a_slope() -> None:
    """From three candidates: gathered weights do not grow with the tokens of a rank."""
    tokens = np.array([1e3, 2e3, 4e3, 8e3, 64e3])
    gathered = np.array([3e9, 3e9, 6e9, 3e9, 6e9])
    parts = np.stack([gathered, tokens, np.zeros(5)])
    resident = np.full(5, 10e9)
    truth = resident + 1.5 * gathered + 2e5 * tokens
    memory = Memory(resident, parts, np.zeros(5, dtype=np.int64))
    for position in (0, 1, 2):
        memory.learn(position, truth[position])
    assert memory.expected() == pytest.approx(truth, rel=0.15)
    before = Memory(resident, parts, np.zeros(5, dtype=np.int64)).expected()
    assert before == pytest.approx(resident + gathered)


def test_times_are_learned_by_column() -> None:
    """A value that was slower than guessed in one candidate is expected to be in others."""
    columns = [np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), np.zeros(4, dtype=np.int64)]
    times = Times(np.ones(4), Effects.of(columns))
    assert len(times.effects.codes) == 2
    times.learn(0, 1.0)
    times.learn(2, 2.0)
    expected = times.factor(0.0)
    assert expected[3] > expected[1]
    assert times.factor(0.1)[1] < expected[1]


def test_the_microbatch_may_be_the_whole_local_batch() -> None:
    model, hardware = load_model("olmoe_1b_7b"), load_profile("rtx4090-24g")
    training = TrainSpec(seq_len=4096, global_batch=24 * 8)
    space = generate(Problem(model, hardware, 1, training), "fsdp2")
    c = space.columns
    data_parallel = c["sequence"] * c["tensor"] * c["pipeline"] == 1
    assert int(space.columns["micro_batch"][data_parallel].max()) == 24
    assert {1, 2, 4, 8, 12, 16, 24} - {12, 16} <= set(space.columns["micro_batch"].tolist())


def test_a_ratio_says_that_a_search_was_not_exhausted() -> None:
    found = asked(("zero_offload", "fsdp2"), 4)
    text = ". ".join(finding(found.best_by_family, {"fsdp2": (0.25, None), "zero_offload": (0.0, None)}))
    assert "is fastest" in text
    assert text.endswith("). Search of fsdp2: not exhausted: a plan left out is at most 25 % faster")
    for proven in (0.0, TIE):
        assert len(finding(found.best_by_family, {"fsdp2": (proven, None)})) == 1
    text = ". ".join(finding({}, {"megatron": (None, None), "fsdp2": (0.0, None)}))
    assert text == "No strategy fits. Search of megatron: not exhausted: a plan left out may fit"


def test_a_large_pool_holds_the_fastest_and_the_leanest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are left out, and count in the gap."""
    monkeypatch.setattr(sys.modules[Pool.__module__], "MOST", 40)
    problem = Problem(TINY, CPU, 1, TRAINING, "float32")
    space = generate(problem, "mop")
    bounds = bound(space)
    pool = Pool.of(space, bounds, np.arange(len(space)))
    assert len(pool.rows) == 40
    assert len(pool.rest) == len(space) - 40
    need = bounds.device + bounds.gathered
    assert need[pool.rows].min() == need.min()
    found = asked(("mop",), 60)
    assert found.gap is not None
    assert found.gap > 0
    assert sum(found.rejected.values()) + len(found.top) == found.candidates


def test_values_that_mopexec_does_not_run_leave_the_space_and_no_other_row_does() -> None:
    """Under the executor's own stack, where only what it runs is asked for: one reason for each value, not
    one candidate at a time."""
    model, hardware, stack = load_model("tiny"), load_profile("h100-sxm-80g"), load_stack("mopexec-split")
    given = model, hardware, 1, TRAINING, "bfloat16", stack
    every, some = generate(Problem(*given), "megatron"), generate(Problem(*given, True), "megatron")
    reasons = [reason for reason in some.rejected if reason.startswith(NOT_RUN)]
    assert any("deepep" in str(one) for one in had(Problem(*given), "megatron").lacks)
    assert any("overlap.experts" in reason for reason in reasons)
    names = sorted(every.columns)
    kept = set(zip(*(some.columns[name].tolist() for name in names), strict=True))
    for index in np.random.default_rng(0).choice(len(every), 400, replace=False):
        row = tuple(int(every.columns[name][index]) for name in names)
        if row not in kept:
            assert runnable(every.build(int(index)), model, TRAINING, stack) is not None


@pytest.mark.parametrize(
    ("family", "stack", "ways"),
    [
        ("fsdp2", "", {"ulysses", "ring", "all_gather"}),
        ("fsdp2", "torchtitan", {"ring", "all_gather"}),
        ("fsdp2", "generic-eager", {"ulysses", "ring", "all_gather"}),
        ("fsdp2", "fms-fsdp", set()),
        ("megatron", "", {"ulysses", "ring", "all_gather"}),
        ("megatron", "deepspeed", {"ulysses"}),
        ("megatron", "megatron-lm-2022", set()),
        ("mop", "", {"ulysses"}),
        ("mop", "torchtitan", set()),
    ],
)
def test_a_sequence_is_traded_in_the_ways_that_the_program_has(
    family: str, stack: str, ways: set[str]
) -> None:
    software = load_stack(stack) if stack else None
    if software and family == "mop":
        software = with_ring(software)
    problem = Problem(TINY, CPU, 1, TRAINING, "float32", software)
    c = generate(problem, family).columns
    assert {EXCHANGES[code] for code in c["exchange"][c["sequence"] > 1].tolist()} == ways
    assert len(set(c["exchange"][c["sequence"] == 1].tolist())) == 1


def test_layer_inputs_stay_where_the_program_keeps_them() -> None:
    def inputs(stack: str) -> tuple[set[int], list[str]]:
        software = with_ring(load_stack(stack))
        problem = Problem(TINY, CPU, 1, TRAINING, "float32", software)
        kept = generate(problem, "mop").columns["boundary_host"]
        return set(kept.tolist()), [str(one) for one in had(problem, "mop").lacks]

    assert inputs("deepspeed")[0] == {0, 1}
    assert inputs("megatron-core")[0] == {0}
    kept, reasons = inputs("torchtitan")
    assert kept == {0}
    says = "strategy.activations.layer_inputs: 'host' is not simulated on the stack torchtitan, only 'device'"
    assert says in reasons


def with_ring(stack: Stack) -> Stack:
    """A fork of the program that has MoP's loss."""
    return replace(stack, has={**stack.has, "vocabulary.loss": ("ring",)})


def test_a_plan_is_found_where_little_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the fast pipelines need more than the device has; bounds that are not refined yet must not keep
    the hunt among them (it refined for minutes and said that nothing fits)."""
    monkeypatch.setattr(staged, "KNOWN", 100)  # fewer layers tell what promises most
    training = TrainSpec(seq_len=4096, global_batch=1536)
    machine, options = load_profile("h200-sxm-141g"), Options(("megatron",), budget=4, rows=20_000)
    found = search(Problem(load_model("mop_1t"), machine, 12, training), options)
    assert found.best is not None
    assert found.best.sure


def test_a_rise_not_seen_is_as_those_seen_usually_are() -> None:
    kinds = np.array([0, 0, 1, 2])
    risen, least = Rise(kinds), Rise(kinds, min)
    for one in (risen, least):
        one.learn(0, 2.0)
        one.learn(0, 4.0)
        one.learn(2, 1.0)
    assert risen.expected().tolist() == [3.0, 3.0, 1.0, 2.0]
    assert least.expected().tolist() == [3.0, 3.0, 1.0, 1.0]


def test_a_rise_is_expected_by_the_values_of_all_columns() -> None:
    """Stages and tensor ranks of refined plans told what others take: a median of all of one tensor degree
    hid a plan of DeepSeek-V3 that is 2 % faster, whose bounds were never refined."""
    stages, ranks = np.array([4, 4, 8, 8, 8]), np.array([2, 4, 2, 4, 4])
    slower = Slower(Effects.of([stages, ranks]))
    assert slower.expected().tolist() == [1.0] * 5
    for _ in range(8):
        for position, times in ((0, 1.2), (1, 1.3), (3, 1.1)):
            slower.learn(position, times)
    found = slower.expected()
    assert found[2] < 1.06 < found[3] == found[4] < 1.13


def test_what_values_add_is_the_same_looked_up_together() -> None:
    draw = np.random.default_rng(0)
    columns = [draw.integers(0, most, 500) for most in (3, 1, 200, 50, 7, 5_000, 2)]
    effects = Effects.of(columns)
    each = draw.normal(size=len(effects.alike))
    apart = sum(each[start:][places] for start, places in zip(effects.starts, effects.codes, strict=True))
    assert effects.added(each, 0.5) == pytest.approx(0.5 + apart)
    assert 1 < len(effects.joined) < len(effects.codes) == sum(count for count, _ in effects.joined)


def test_experts_of_the_longest_sequences_go_in_chunks_that_fit() -> None:
    """8M tokens on two nodes: a rank's rows of experts in chunks of 64K leave no room, those of 32K do."""
    found = mopsim.search(
        "mop_120b", "h200-sxm-141g", nodes=2, seq_len="8M", global_batch=1, families="mop", budget=12
    )
    assert found.best is not None
    assert found.best.strategy.experts.chunk_tokens <= 32 * 1024


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_without_experts_has_no_choice_of_them(family: str) -> None:
    """`search` tried degrees of experts' shards of llama2_70b, and printed expert-FSDP and expert-chunk."""
    dense = load_model("llama2_70b")
    problem = Problem(dense, load_profile("h100-sxm-80g"), 2, TrainSpec(seq_len=4096, global_batch=16))
    found = search(problem, Options((family,), top=3, budget=2))
    assert "expert" not in " ".join(one.line for one in (*found.played, found.closest) if one)
    space = candidates(problem, family)[0]
    names = {"experts", "expert_tensor", "expert_shard", "dense_shard", "dispatcher", "overlap", "strided"}
    choices = zip(*(space.columns[name] for name in sorted(names & space.columns.keys())), strict=True)
    assert len(set(choices)) == len(set(space.columns["dense_shard"]))
