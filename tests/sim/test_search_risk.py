"""Where no plan is sure to fit: the likeliest comes first, is written, and one line says so."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

import mopsim
import mopsim.commands.search
from mopsim import commands
from mopsim.api.results import Ranking
from mopsim.api.run import played
from mopsim.commands.compare import run as run_compare
from mopsim.common.errors import MopError
from mopsim.context.contenders import contenders
from mopsim.context.sweep import ContextPoint, Curve, nested
from mopsim.engine import SimResult
from mopsim.intervals.spread import SURE
from mopsim.report.findings import finding, risks, verdict
from mopsim.report.tables import best_of_others
from mopsim.search import Options
from mopsim.search.result import proof
from mopsim.search.simulating import chosen
from mopsim.size.ask import _memory_reason
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack
from mopsim.spec.upgrade import load_plan
from tests.sim.test_search import with_memory

TINY = msgspec.structs.replace(load_model("tiny"), num_attention_heads=3, num_key_value_heads=3)
"""Heads that two ranks do not split: of tensor parallelism one plan is so lean that no other may fit."""
TIGHT = with_memory(load_profile("cpu-2core"), 12_203_692)
"""0.4 % more than the leanest plan of FSDP2 needs, whose tensors are known within 0.6 %."""
JOB: dict[str, Any] = {
    "model": TINY, "hardware": TIGHT, "seq_len": "512", "global_batch": 4,
    "precision": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def ranking() -> Ranking:
    return mopsim.search(**JOB, families="fsdp2", top=2, budget=12)


@pytest.fixture(scope="module")
def plan(ranking: Ranking) -> SimResult:
    """One that is sure to fit."""
    best = ranking.found.best
    assert best is not None
    return with_odds(best, 1.0)


def with_odds(one: SimResult, odds: float) -> SimResult:
    """The same plan on a device on which it fits with this probability."""
    if odds == 1.0:
        return replace(one, memory_limit=10 * one.peak_memory, fits=True)
    return replace(one, memory_limit=round(one.device.as_described.quantile(odds)), fits=True)


def test_the_sure_come_first_by_speed_and_then_the_likely(plan: SimResult) -> None:
    slow, fast = (replace(plan, step_time=times * plan.step_time) for times in (1.5, 1.2))
    likely, bold = with_odds(replace(plan, step_time=1.1 * plan.step_time), 0.853), with_odds(plan, 0.52)
    alike = with_odds(replace(plan, step_time=1.3 * plan.step_time), 0.857)
    assert chosen([bold, slow, alike, likely, fast]) == [fast, slow, likely, alike, bold]
    assert chosen([bold, alike, likely], 2) == [likely, alike]
    assert [one.sure for one in (plan, likely, bold)] == [True, False, False]
    assert with_odds(plan, 0.898).assurance < with_odds(plan, 0.902).assurance == plan.assurance


def test_a_search_of_what_is_not_sure_takes_the_likeliest(ranking: Ranking) -> None:
    found = ranking.found
    best = found.best
    assert best is not None
    assert best.assurance == max(one.assurance for one in found.played) < SURE
    assert found.best_by_family["fsdp2"] == best
    assert ranking.best is not None
    assert ranking.best.result == best
    said = "no plan that was simulated fits, as described, with probability 0.9: the likeliest, "
    assert found.doubt.startswith(said)
    assert found.doubt.endswith(", comes first")
    assert ranking.headline().startswith(said)
    assert found.to_json()["verdict"] == found.verdict()


def test_that_none_is_sure_is_no_proof(ranking: Ranking) -> None:
    """Slower plans that were not tried may be sure to fit."""
    assert ranking.found.gap is None
    assert ranking.found.outcome() == proof(None) == "not exhausted: a plan left out may fit"


def test_a_first_plan_at_risk_is_said_to_be(ranking: Ranking, plan: SimResult) -> None:
    found, bold = ranking.found, with_odds(plan, 0.3)
    likely = with_odds(plan, 0.6)
    told = replace(found, top=[bold], played=[bold, likely]).doubt
    assert told.endswith(": the first with 0.30, the likeliest with 0.60")
    told = replace(found, top=[bold], played=[bold, plan]).doubt
    assert told == "the first plan fits, as described, with probability 0.30 only"
    assert replace(found, top=[plan], played=[bold, plan]).doubt == ""
    assert replace(found, top=[], played=[]).doubt == ""


def test_the_command_says_so_before_the_table_and_writes_that_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, ranking: Ranking
) -> None:
    monkeypatch.setattr(commands.search, "search", lambda **_: ranking)
    path = tmp_path / "plan.yaml"
    assert commands.search.run(jobs=1, plan=str(path), seal=None, json=None, **JOB) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.index(ranking.found.doubt) < said.index("P(fits)")
    predicted = load_plan(path).prediction
    assert ranking.found.best is not None
    assert predicted is not None
    assert predicted.p_fits_as_described == pytest.approx(ranking.found.best.p_as_described)


def test_compare_and_simulate_say_what_may_not_fit(
    capsys: pytest.CaptureFixture[str], ranking: Ranking
) -> None:
    best = ranking.found.best
    assert best is not None
    job = JOB | {"strategies": ["fsdp2"], "budget": 12}
    assert run_compare(out=None, sweep=None, hold="tokens-per-step", formats="png", json=None, **job) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"fsdp2 {best.chance} only." in said
    assert ranking.found.doubt in played("fsdp2", ranking.inputs, budget=12).notes


@pytest.mark.parametrize(("confidence", "first"), [(0.0, "bold"), (0.9, "wary"), (0.99, "wary")])
def test_a_search_takes_plans_by_the_odds_that_are_asked_for(
    plan: SimResult, confidence: float, first: str
) -> None:
    """Both fit as described; if the program keeps other tensors, the faster one may not."""
    facts = replace(plan.facts, stack="megatron-core", exact=False)
    wary = replace(plan, facts=facts, memory_limit=2 * plan.peak_memory, fits=True)
    bold = replace(wary, step_time=plan.step_time / 2, memory_limit=round(1.3 * plan.peak_memory))
    assert bold.sure
    assert 0.5 < bold.p_fits < 0.9 < wary.p_fits
    assert chosen([wary, bold], confidence=confidence)[0] == {"bold": bold, "wary": wary}[first]
    asked = Options(confidence=confidence)
    assert asked.takes(wary) == (wary.p_fits >= confidence)
    assert asked.takes(bold) == (bold.p_fits >= confidence)
    assert bold.device.enough(0.9) == bold.device.quantile(0.9) > bold.device.enough()


def test_no_confidence_is_asked_for_of_plans_at_risk() -> None:
    with pytest.raises(MopError, match=r"confidence: 0.9 cannot be asked for with --risk"):
        Options(risk=True, confidence=0.9)
    with pytest.raises(MopError, match=r"confidence: 9.0 must lie between 0 and 0.999"):
        Options(confidence=9.0)


def test_a_written_plan_comes_with_those_that_may_be_preferred(ranking: Ranking, plan: SimResult) -> None:
    """Of a stack that mopexec does not run, and one that leaves more room."""
    facts = replace(plan.facts, stack="megatron-core", exact=False)
    bold = replace(
        plan, facts=facts, stack=load_stack("megatron-core"), step_time=plan.step_time / 2,
        memory_limit=round(1.3 * plan.peak_memory), fits=True,
    )  # fmt: skip
    found = replace(ranking.found, top=[bold], played=[bold, plan])
    assert found.surer == found.run_by_mopexec == plan
    runs, surer = commands.search._instead(found)
    assert runs == (
        "mopexec runs a plan that is 100% slower, P(fits) >0.99 (--runnable ranks only such): "
        f"{plan.line} on {plan.stack.name}"
    )
    assert surer.startswith(
        "more likely to fit is a plan that is 100% slower, P(fits) >0.99 (--confidence 0.9 "
    )
    assert commands.search._instead(replace(found, top=[plan])) == []


def test_of_a_comparison_the_risky_are_named(plan: SimResult) -> None:
    bold = with_odds(replace(plan, step_time=plan.step_time / 2), 0.3)
    said = "a fits, as described, with probability 0.30 only"
    assert risks({"a": bold, "b": plan, "c": None}) == said
    assert said in verdict({"a": bold, "b": plan})
    assert risks({"b": plan}) == ""


def test_a_comparison_tells_a_faster_plan_that_its_search_left_as_unsure(plan: SimResult) -> None:
    """A lead of 1.90 was told without it, where the loser's plan of P(fits) 0.84 is 46 % faster."""
    best, slow = plan, replace(plan, step_time=2 * plan.step_time)
    bold = with_odds(replace(plan, step_time=1.25 * plan.step_time), 0.84)
    said = finding({"a": best, "b": slow}, {"b": (0.0, 0.0)}, at_risk={"b": bold})
    assert said[1] == (
        "Search of b: its plan is more likely to fit than one that is 60 % faster, which fits, as "
        f"described, with probability 0.84 (search --risk ranks it; with it a is fastest, 1.25x as "
        f"fast as b): {bold.line}"
    )
    assert said[1] in verdict({"a": best, "b": slow}, at_risk={"b": bold})
    faster = finding({"a": best, "b": slow}, at_risk={"b": replace(bold, step_time=best.step_time / 2)})
    assert "with it b is fastest, 2.00x as fast as a" in faster[1]


def test_odds_of_an_unfinished_search_are_of_the_plans_found(plan: SimResult) -> None:
    both = {"a": plan, "b": replace(plan, step_time=1.1 * plan.step_time)}
    of = "of the plans found it is the faster one"
    assert of in finding(both, {"a": (0.5, 0.0), "b": (0.5, 0.48)})[0]
    assert of not in finding(both, {"a": (0.5, 0.48), "b": (0.5, 0.0)})[0]
    assert of not in finding(both)[0]


def test_odds_stand_beside_the_best_of_other_families(plan: SimResult) -> None:
    other = msgspec.structs.replace(plan.strategy, name="mop")
    bold = with_odds(replace(plan, strategy=other), 0.3)
    said = best_of_others({"mop": bold}, plan, {}).plain
    assert "as described, device memory is enough with probability 0.30" in said


def test_size_refuses_it_with_the_odds_of_the_likeliest(ranking: Ranking) -> None:
    best = ranking.found.best
    assert best is not None
    assert _memory_reason(ranking.found) == f"{best.chance} only"


def test_a_context_is_reached_by_the_likeliest(plan: SimResult) -> None:
    bold, likely = with_odds(replace(plan, step_time=plan.step_time / 2), 0.3), with_odds(plan, 0.6)
    contender = contenders()[0]
    points = [ContextPoint(512, 4, one) for one in (bold, likely)]
    curves = {str(index): Curve(contender, [point]) for index, point in enumerate(points)}
    found = nested(curves)["0"].points[0].result
    assert found == likely
