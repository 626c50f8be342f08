"""Ties are one row; the answer says why; where nothing fits, what would."""

from dataclasses import replace
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

import mopsim
from mopsim.common.io import to_plain
from mopsim.common.units import GIB, format_bytes
from mopsim.engine import SimResult
from mopsim.intervals.spread import SURE
from mopsim.report.alternatives import freedom, otherwise
from mopsim.report.explore.steps import as_fast
from mopsim.report.tables import _surer
from mopsim.search import Options, SearchResult, search
from mopsim.search.driver import Hunted
from mopsim.search.problem import Problem, divisors
from mopsim.search.restricted import RESTRICTIONS, Spare, try_restricted
from mopsim.search.result import TIE, Freedom
from mopsim.search.simulating import ranked
from mopsim.search.ties import TIED, Row, rows
from mopsim.search.why import waits, why
from mopsim.spec.line import choices
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.training import TrainSpec
from mopsim.strategies import FAMILIES, fsdp2, megatron, mop
from tests.sim.spaces import candidates
from tests.sim.test_search import with_memory

TINY, CPU = load_model("tiny"), load_profile("cpu-2core")
TRAINING = TrainSpec(seq_len=512, global_batch=4)
OPTIONS = Options(budget=10)


def given(memory: float = 8e9, options: Options = OPTIONS) -> tuple[SearchResult, Problem]:
    hardware = with_memory(CPU, memory)
    problem = Problem(TINY, hardware, 1, TRAINING, "float32")
    return search(problem, options), problem


@pytest.fixture(scope="module")
def asked() -> tuple[SearchResult, Problem]:
    """A search of all families, and what it was asked."""
    return given()


@pytest.fixture
def found(asked: tuple[SearchResult, Problem]) -> SearchResult:
    return asked[0]


@pytest.fixture
def problem(asked: tuple[SearchResult, Problem]) -> Problem:
    return asked[1]


def test_ties_of_a_family_are_one_row(found: SearchResult) -> None:
    for place, one in enumerate(found.top):
        for other in found.top[place + 1 :]:
            apart = abs(one.step_time - other.step_time) > TIE * min(one.step_time, other.step_time)
            assert apart or one.strategy.name != other.strategy.name
    assert sum(found.rejected.values()) + len(found.top) == found.candidates
    assert len(found.free) == len(found.top)


def tied(result: SimResult, seconds: float, **fields: Any) -> SimResult:
    return replace(result, step_time=seconds, strategy=msgspec.structs.replace(result.strategy, **fields))


def test_what_is_free_in_a_row_is_named(found: SearchResult) -> None:
    best = found.top[0]
    near, far = tied(best, best.step_time * 1.004, micro_batch=7), tied(best, best.step_time * 1.1)
    two = rows([best, near, far], 5)
    assert [len(row.tied) for row in two] == [1, 0]
    free = two[0].freedom()
    assert free == Freedom({"micro_batch": [best.strategy.micro_batch, 7]})
    plan = to_plain(best.strategy)
    assert freedom(plan, free.alone, free.together) == "mbs=7"
    assert freedom(plan, {}, []) == ""
    assert freedom({}, {"activations.modules": [("moe_act", "mlp"), ()]}, []) == "", "no plan, no words"
    assert TIED


def test_what_is_as_fast_only_together_is_not_told_as_free(found: SearchResult) -> None:
    """Of three fields one is free by itself, two change with each other only; all three are both of that."""
    best = found.top[0]
    pair, name = {"micro_batch": 7, "dense.chunk_tokens": 64}, best.strategy.stack
    made = {"micro_batch": 7, "dense": msgspec.structs.replace(best.strategy.dense, chunk_tokens=64)}
    changes: list[dict[str, Any]] = [{"stack": "x"}, made, {"stack": "x", **made}, {"stack": "y", **made}]
    free = rows([best, *(tied(best, best.step_time, **one) for one in changes)], 5)[0].freedom()
    assert free == Freedom({"stack": [name, "x"]}, [pair, {"stack": "y", **pair}])
    plan = to_plain(best.strategy)
    said = freedom(plan, free.alone, free.together)
    assert said == "mbs=7 with ffn-chunk=64", "no line of a plan says its stack"
    pairs = [pair | {"dense.chunk_tokens": 64 * count} for count in range(1, 6)]
    assert freedom(plan, {}, pairs).endswith("; or one of 2 more combinations")
    assert freedom(plan, {}, pairs[:4]).endswith("; or one more combination")
    written = replace(found, top=[best], free=[free]).to_json()["top"]
    assert isinstance(written, list)
    assert written[0]["as_fast"] == free.alone
    assert written[0]["as_fast_together"] == free.together
    assert as_fast(written[0]) == said


def test_what_is_as_fast_is_named_as_plans_are_printed() -> None:
    plan = to_plain(mop(8, expert_parallel=8, vocab_parallel=4, offload_inputs=True, optimizer="host"))
    alone = {"experts.expert_parallel": 1, "experts.expert_fsdp": 8}
    assert otherwise(plan, {**alone, "activations.layer_inputs": "device"}) == ["offload=optimizer", "EP=1"]
    assert otherwise(plan, {"vocabulary.vocab_parallel": 1}) == ["loss=ring"]
    spread = to_plain(megatron(8, context_parallel=2, context_exchange="all_gather"))
    one = {"attention.context_parallel": 1, "attention.cp_comm_type": "ring"}
    assert otherwise(spread, one) == ["DP=8"], "the ranks say that CP is 1"
    experts = {"experts.param_tier": "host", "experts.prefetch": 2}
    assert freedom(plan, {"experts.param_tier": ["device", "host"]}, [experts]) == ""
    deepep = to_plain(megatron(8, expert_parallel=4, token_dispatcher="deepep"))
    usual = {"experts.token_dispatcher": "alltoall", "experts.expert_parallel": 8, "experts.expert_fsdp": 1}
    assert otherwise(deepep, usual) == ["EP=8", "dispatch=alltoall"], "not that nothing is dispatched"
    assert otherwise(deepep, usual | alone) == ["EP=1"]
    some = to_plain(megatron(8, recompute="selective", recompute_modules=("moe_act",)))
    every = {"activations.recompute": "full", "activations.modules": []}
    assert otherwise(some, every) == ["recompute=full"]
    device = {"optimizer.state_tier": "device", "optimizer.update_on": "device"}
    assert otherwise(plan, {**device, "activations.layer_inputs": "device"}) == ["no offload"]


def test_a_tie_is_led_by_what_keeps_nothing_on_the_host(found: SearchResult) -> None:
    """Wherever the fastest lies; what ties with it stays however many are asked for."""
    best = replace(found.top[0], host_memory=0, peak_memory=9)
    for seconds in np.linspace(1.0, 1.01, 7):
        host = [replace(best, step_time=seconds * (1 + far), host_memory=1) for far in (0, 0.001, 0.006)]
        device = replace(best, step_time=seconds * 1.0045)
        assert ranked([*host, device], 1) == [device, *host[:2]]
        assert ranked([*host, device]) == [device, *host]


def test_a_tie_is_led_by_the_plainest_whatever_comes_first(found: SearchResult) -> None:
    best = replace(found.top[0], host_memory=0)
    plain = replace(best, strategy=megatron(8), peak_memory=9)
    others: list[dict[str, Any]] = [
        {"micro_batch": 2}, {"tensor_parallel": 2},
        {"recompute": "selective", "recompute_modules": ("layernorm", "moe_act")},
    ]  # fmt: skip
    fancy = [
        replace(best, step_time=best.step_time * 0.998, strategy=megatron(8, **one), peak_memory=peak)
        for peak, one in enumerate(others)
    ]
    counted = [choices(one.strategy) for one in (plain, *fancy)]
    assert counted == [2, 3, 5, 4]
    for order in permutations([plain, *fancy]):
        assert ranked(order)[0] == plain
        (row,) = rows(ranked(order), 5)
        assert row.best == plain
        assert row.freedom().alone["micro_batch"] == [1, 2]


def test_what_only_another_family_keeps_is_said_to_be_its(found: SearchResult, problem: Problem) -> None:
    """What a restriction costs was told of another family's plan as if of the first's."""
    best = found.best
    assert best is not None
    host = replace(best, host_memory=1)
    other = replace(best, strategy=fsdp2(4), host_memory=0, step_time=1.5 * best.step_time)
    name = best.strategy.name

    def told(*played: SimResult) -> str:
        (line,) = (
            one
            for one in why(replace(found, top=[host], played=[host, *played]), problem)
            if one.startswith("nothing on the host: ")
        )
        return line

    assert ": the fastest simulated plan is 50% slower, of another family, " in told(other)
    assert told(other).endswith(f"; no simulated plan of {name} that fits keeps to this")
    own = replace(best, host_memory=0, step_time=2 * best.step_time)
    assert f"; of {name}, the fastest simulated plan is 100% slower, " in told(other, own)
    assert "family" not in told(replace(own, step_time=best.step_time))


def test_why_says_what_bounds_and_what_restrictions_cost(found: SearchResult, problem: Problem) -> None:
    lines = why(found, problem)
    assert lines[0].startswith("the step of ")
    assert "compute waits" in lines[0]
    best = found.best
    assert best is not None
    others = {one.strategy.name for one in found.best_by_family.values() if one} - {best.strategy.name}
    for family in others:
        assert any(line.startswith(f"{family} takes ") for line in lines)
    kept = [line for line in lines if line.startswith("only plans that mopexec runs")]
    assert len(kept) == (best.strategy.name == "megatron")
    assert lines == why(found, problem)


def test_waits_are_told_until_most_is_and_of_the_exchanges_that_the_plan_has(found: SearchResult) -> None:
    """Of 6 % only the 2 % of the largest were told, of a plan without all-to-alls of sequences as of both."""
    best = found.best
    assert best is not None
    parts = {"all_to_all": 0.020, "peers": 0.015, "all_gather": 0.011, "reduce_scatter": 0.011, "host": 0.001}
    plan = mop(4, expert_parallel=4, context_parallel=2)
    one = replace(best, step_time=1.0, exposed=parts, strategy=plan)
    told = [name for name, _ in waits(one)]
    assert told[:2] == ["all-to-alls of experts and sequences", "other pipeline stages"]
    assert 0.75 * sum(parts.values()) <= sum(share for _, share in waits(one)) < sum(parts.values())
    gathered = msgspec.structs.replace(plan.attention, cp_comm_type="all_gather")
    one = replace(one, strategy=msgspec.structs.replace(plan, attention=gathered))
    assert waits(one)[0][0] == "all-to-alls of experts"
    assert waits(replace(one, exposed={"all_to_all": 0.019})) == []
    assert one.waits["other stages"] == parts["peers"] == one.exposed["peers"]


def test_of_what_keeps_a_rule_only_what_may_be_faster_than_known_is_tried(
    found: SearchResult, problem: Problem
) -> None:
    """Of all families, once each is searched; what was tried is no longer left."""
    assert found.best is not None
    best = replace(found.best, host_memory=1)
    space, _ = candidates(problem, "fsdp2")
    rule = "nothing on the host"
    columns = RESTRICTIONS[rule].columns.items()
    every = (space.row(place) for place in range(len(space)))
    row = next(one for one in every if all(one.get(name, value) == value for name, value in columns))
    some = [Spare(frozenset([rule]), row, space.stack, bound=9.0, seconds=most) for most in (1e9, 0.1)]
    searched = SearchResult(problem.model)
    tried = try_restricted(best, {"fsdp2": (searched, some)}, problem, OPTIONS, lambda found: None)
    assert tried == [("fsdp2", some[1])]
    assert searched.simulated == len(searched.played) == 1
    assert searched.played[0].host_memory == 0
    one = Hunted(searched, left=np.array([8.0, 9.0, 9.0]))
    assert list(one.without(some[1]).left) == [8.0, 9.0]
    none_left = replace(OPTIONS, budget=1)
    assert try_restricted(best, {"fsdp2": (searched, some)}, problem, none_left, lambda found: None) == []


@pytest.mark.parametrize(
    ("family", "cannot", "other"),
    [("mop", "no recomputation", "fsdp2"), ("zero_offload", "nothing on the host", "mop")],
)
def test_a_choice_that_no_family_searched_has_is_no_restriction(
    found: SearchResult, problem: Problem, family: str, cannot: str, other: str
) -> None:
    """MoP recomputes always, ZeRO-Offload has its optimizer on the host: no plan was refused for that."""

    def told(*families: str) -> bool:
        best = found.best_by_family[family]
        assert best is not None
        asked = replace(
            found, top=[best], best_by_family={one: found.best_by_family[one] for one in families}
        )
        return any(line.startswith(f"{cannot}: ") for line in why(asked, problem))

    assert told(family, other)
    assert not told(family)


def test_more_memory_that_would_help_is_told(found: SearchResult, problem: Problem) -> None:
    """A plan that is faster and does not fit by 1 GiB."""
    best = found.best
    assert best is not None
    over = replace(
        best, step_time=best.step_time / 2, fits=False, over="optimizer",
        peak_memory=best.memory_limit + GIB,
    )  # fmt: skip
    lines = why(replace(found, played=[*found.played, over]), problem)
    needed = over.device.as_described.quantile(min(SURE, best.p_as_described)) - best.memory_limit
    assert needed > GIB
    said = (
        f"more device memory a rank ({format_bytes(needed)}), a plan fits, as described, with probability 0.9"
    )
    assert any(said in line and "100% faster" in line for line in lines)


def test_a_faster_plan_at_risk_is_told(found: SearchResult, problem: Problem) -> None:
    best = found.best
    assert best is not None
    bold = replace(best, step_time=best.step_time / 2, peak_memory=int(best.memory_limit * 0.999))
    assert bold.p_as_described < best.p_as_described
    with_it = replace(found, played=[*found.played, bold])
    assert with_it.at_risk == bold
    told = [line for line in why(with_it, problem) if "--risk ranks it" in line]
    assert any("more likely to fit than one that is 100 % faster" in line for line in told)
    written = with_it.to_json()["at_risk"]
    assert isinstance(written, dict)
    assert written["step_time_s"] == bold.step_time
    tie = replace(bold, step_time=best.step_time / (1 + TIE / 2))
    assert replace(found, played=[*found.played, tie]).at_risk is None


def test_why_is_asked_for_only_when_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    ranking = mopsim.search("tiny", "cpu-2core", seq_len=512, global_batch=4, families=["fsdp2"], budget=3)
    monkeypatch.setattr("mopsim.api.results.why", lambda *_: pytest.fail("why is asked"))
    assert ranking.simulated == 3
    assert ranking.gap is None or ranking.gap >= 0
    monkeypatch.setattr("mopsim.api.results.why", lambda *_: ["because"])
    assert ranking.why == ["because"]
    assert ranking.to_json()["why"] == ["because"]
    assert ranking["why"] == ["because"]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_batch_of_too_many_microbatches_is_ruled_out_at_once(family: str) -> None:
    """Row by row it took minutes."""
    training = TrainSpec(seq_len=1 << 20, global_batch=10**6)
    hardware = load_profile("h200-sxm-141g")
    space, _ = candidates(Problem(TINY, hardware, 2, training, "bfloat16"), family)
    for index in np.linspace(0, len(space) - 1, 20).astype(int):
        training.check_strategy(space.build(int(index)))


def test_divisors_of_large_numbers() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(36) == [one for one in range(1, 37) if 36 % one == 0]
    assert len(divisors(2**40 * 3)) == 82


@pytest.mark.parametrize(("chances", "surest"), [((0.9, 0.84), 0), ((0.84, 0.85), None)])
def test_a_tied_plan_that_is_surer_to_fit_is_told(chances: tuple[float, ...], surest: int | None) -> None:
    def plan(chance: float) -> SimpleNamespace:
        return SimpleNamespace(strategy=mop(8), p_fits=chance, peak_memory=111 << 30, line="EP=8")

    tied = [plan(one) for one in chances]
    surer = Row(plan(0.81), tied).freedom().surer  # type: ignore[arg-type]
    assert surer is (None if surest is None else tied[surest])
    said = "; as fast and more likely to fit: 111 GiB, P(fits) 0.90: EP=8"
    assert _surer(surer) == ("" if surest is None else said)
