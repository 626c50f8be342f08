"""Answers of a sizing beyond the bill: Pareto, near misses, what-if, measurements, the page to sign by."""

import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from math import exp
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import pytest

import mopsim
from mopsim.api.size import Clusters
from mopsim.common import io
from mopsim.common.units import format_days, format_probability, format_span
from mopsim.intervals.errors import known_errors
from mopsim.report.decision import Decision, content, texts
from mopsim.report.sizing import missed, stated, summary, surely
from mopsim.search import staged
from mopsim.size import Goal, Point, Sizing
from mopsim.size.benchmarks import of_machine, spreads
from mopsim.size.decided import Decided
from mopsim.size.figures import DAY, WIDE
from mopsim.size.points import Request, nearest_miss
from mopsim.size.settle import settle
from mopsim.spec.observed import Observed
from mopsim.spec.stacks import load_stack

JOB: dict[str, Any] = {
    "tokens": "300B", "seq_len": 4096, "families": ["fsdp2"], "max_nodes": 8, "simulations": 2,
    "global_batch_tokens": "1M",
}  # fmt: skip
MACHINES = ["h100-sxm-80g", "gb200-186g"]
pytestmark = pytest.mark.xdist_group("sizings of OLMoE")  # ask much of the same, which is answered once


def size(*given: Any, **named: Any) -> Clusters:
    """What promises most is told by a sixth of the layers of a search."""
    with patch.object(staged, "KNOWN", 100):
        return mopsim.size(*given, **named)


@pytest.fixture(scope="module")
def found() -> Clusters:
    return size("olmoe_1b_7b", MACHINES, days=10, **JOB)


def decided(request: Request, *points: Point) -> Decided:
    """What is recommended of these clusters."""
    return Decided(request, [Sizing(points[0].hardware, points[0], list(points))])


def test_the_front_is_beaten_by_nothing(found: Clusters) -> None:
    front = found.front
    assert front
    for point in found.points:
        for kept in front:
            assert point.figures.cost is not None
            assert kept.figures.cost is not None
            better = point.figures.cost < kept.figures.cost and point.figures.seconds < kept.figures.seconds
            assert not better


def test_json_has_what_a_buyer_asks(found: Clusters) -> None:
    data = found.to_json()
    wanted = {
        "hardware", "nodes", "gpus", "days_interval", "cost_interval", "p_deadline", "goodput", "strategy",
    }  # fmt: skip
    assert data["points"]
    for point in (*data["points"], *data["pareto"], data["recommended"]):
        assert wanted <= set(point)
        low, high = point["days_interval"]
        assert low < point["days"] < high
        assert 0 < point["goodput"] < 1
        assert 0 <= point["p_deadline"] <= 1
    assert data["nearest_miss"] is None
    assert data["recommended"]["p_deadline"] >= 0.5
    assert json.dumps(io.to_plain(data), allow_nan=False)


def test_more_nodes_are_not_slower_or_it_is_said(found: Clusters) -> None:
    for name in MACHINES:
        seconds = float("inf")
        for point in (one for one in found.points if one.hardware.name == name):
            assert point.figures.seconds < seconds * 1.006 or "no faster than" in point.why
            seconds = min(seconds, point.figures.seconds)


def test_what_if_moves_days_and_cost_and_a_measurement_narrows_them(found: Clusters) -> None:
    chosen = found.chosen
    assert chosen.figures is not None
    swings = found.what_if()
    names = {one.name for one in swings}
    assert {"step_time", "price", "matmul"} <= names
    bill = chosen.figures
    for swing in swings:
        if swing.name in ("step_time", "matmul", "grouped_matmul"):
            assert swing.low.days < bill.days < swing.high.days
    time = next(one for one in swings if one.name == "step_time")
    assert (time.low.value, time.high.value) == pytest.approx(chosen.result.step_time_interval(0.9))
    wide = exp(WIDE * bill.step_deviation)
    assert (time.low.days, time.high.days) == pytest.approx((bill.days / wide, bill.days * wide))
    open_ = spreads(chosen.hardware, chosen.num_devices, bill, chosen.result)
    moved = [math.log(one.high.days / one.low.days) / (2 * WIDE) for one in swings if one.name in open_]
    assert 0 < sum(one**2 for one in moved) < 1.1 * of_machine(bill, chosen.result)
    left = settle(chosen, swings)
    assert all(0 < one.after <= one.before for one in left)
    assert left[-1].after == min(one.after for one in left)
    assert left[0].before == pytest.approx(2.718281828 ** (WIDE * bill.deviation) - 1)


def test_a_probe_leaves_what_is_of_the_program_and_the_run(found: Clusters) -> None:
    """Curves that are assumed, each kind of work far off: the probe was said to settle the whole step."""
    chosen, sd = found.chosen, known_errors().step_time.deviations
    assert chosen is not None
    assert chosen.figures is not None
    swings = [
        replace(one, low=replace(one.low, days=chosen.figures.days / 2))
        for one in found.what_if()
        if one.name in ("matmul", "attention", "all_gather", "all_reduce")
    ]
    *parts, whole = settle(chosen, swings)
    assert parts
    least = math.expm1(WIDE * sd.widening * math.hypot(sd.run, sd.stack, sd.source))
    for one in parts:
        assert max(least, whole.after) <= one.after <= one.before
        assert one.benchmark.nodes <= chosen.num_nodes


def test_a_stack_without_a_measured_run_is_named(found: Clusters) -> None:
    """Runs of MoP were never measured; a stack of published runs, or of the user's own, has no such line."""
    chosen = found.chosen
    assert chosen is not None
    assert chosen.result is not None
    cells = known_errors().step_time.cells
    stacks = {one.stack for one in cells}

    def said(stack: str, *seen: Observed) -> list[str]:
        software = load_stack(stack)
        result = replace(chosen.result, stack=software, facts=replace(chosen.result.facts, seen=seen))
        point = replace(chosen, result=result)
        alone = decided(found.request, point)
        lines = (texts(Decision(alone))["risks"], stated(alone))
        return [line for one in lines for line in one if line.startswith(f"No measured run of {stack} is")]

    assert re.search(r"\(only of its variants .*megatron-bridge, megatron-", said("megatron-core-graphs")[0])
    risk, text = said("mopexec-flat")
    assert risk == text
    assert "nor of a variant" in risk
    assert f"{sum(one.runs for one in cells):,.0f} runs of {len(stacks)} other programs" in risk
    assert not said(min(stacks))
    seen = Observed(stack="mopexec-flat", precision="bf16", network="x", runs=3, step_time=0.1)
    assert not said("mopexec-flat", seen)


def test_the_days_are_those_of_the_arithmetic(found: Clusters) -> None:
    """Steps, seconds of a step, the factor and the goodput stand together and give the days."""
    point = found.chosen
    wide = replace(point.figures, measured_over_predicted=1.06, seconds=point.figures.seconds * 1.06)
    decision = Decision(decided(found.request, replace(point, figures=wide)))
    found_numbers = re.search(
        r"([\d,]+) steps of (\S+) (\w+) as simulated \(the days count 1.06 times that, (\S+) \3",
        texts(decision)["why"][0],
    )
    steps, alone, unit, counted = found_numbers.groups()
    assert float(counted) == pytest.approx(1.06 * float(alone), rel=0.01)
    seconds = float(counted) * {"s": 1.0, "ms": 1e-3}[unit] * float(steps.replace(",", ""))
    factor = wide.measured_over_predicted / point.figures.measured_over_predicted
    assert seconds / point.figures.goodput.share == pytest.approx(point.figures.seconds * factor, rel=0.01)


def test_carried_plans_are_named_and_a_proof_is_of_one_number_of_nodes(found: Clusters) -> None:
    chosen = found.chosen
    assert chosen is not None
    searched, carried = replace(chosen, gap=0.001), replace(chosen, gap=None)
    assert "on this number of nodes proven" in summary(searched)
    assert "plan adapted from another number of nodes" in summary(carried)
    page = content(Decision(decided(found.request, searched)))
    assert "no search bounds what another number of nodes would cost" in " ".join(page["risks"])
    for point, named in ((searched, False), (carried, True)):
        rivals = content(Decision(decided(found.request, point)))["rivals"]
        assert ("adapted plan" in rivals.rows[0][-2]) is named


def test_the_page_needs_nothing_beside_it(found: Clusters, tmp_path: Path) -> None:
    written = {path.name for path in found.write(tmp_path / "out")}
    pictures = {f"{name}.{kind}" for name in ("pareto", "tornado") for kind in ("png", "svg")}
    wanted = {"decision.html", "what_if.json", "size.json", *pictures}
    assert written == wanted
    page = (tmp_path / "out" / "decision.html").read_text("utf-8")
    assert not re.search(r'(src|href)="(?!#)', page)
    assert page.count("<svg") == 2
    assert "Network:" not in page  # the rent has it
    for said in ("Rivals", "Risks", "What if", "What to measure before signing", "mopexec", "Rent "):
        assert said in page
    assert "None" not in page


def test_a_budget_is_searched_for_and_the_fastest_within_it_is_recommended(found: Clusters) -> None:
    chosen = found.chosen
    assert chosen.figures.cost is not None
    budget = chosen.figures.cost * 1.3
    rich = size("olmoe_1b_7b", [chosen.hardware.name], budget=budget, **JOB)
    assert rich.chosen.figures.cost is not None
    assert rich.chosen.figures.cost <= budget
    assert rich.chosen.figures.seconds <= chosen.figures.seconds
    assert rich.to_json()["deadline_s"] is None
    assert rich.to_json()["recommended"]["p_deadline"] is None


def test_where_none_will_do_the_nearest_miss_says_what_would(tmp_path: Path) -> None:
    none = size("olmoe_1b_7b", ["h100-sxm-80g"], days=0.7, **JOB)
    assert none.chosen is None
    assert none.best is None
    miss = none.miss
    assert miss.days is not None
    assert miss.days > 0.7
    assert none.to_json()["nearest_miss"]["needs"] == {"days": miss.days, "larger_batch": True}
    again = size("olmoe_1b_7b", ["h100-sxm-80g"], days=miss.days * 1.001, **JOB)
    assert again.chosen is not None
    none.write(tmp_path / "none")
    assert "No cluster meets the limits" in (tmp_path / "none" / "decision.html").read_text("utf-8")


def test_more_nodes_are_advised_only_where_they_would_help(found: Clusters) -> None:
    point = found.points[-1]
    assert point.figures is not None

    def advice(late: float, sequences: int) -> str:
        many = msgspec.structs.replace(point.training, global_batch=sequences)
        one = replace(point, training=many, in_time=False)
        return missed(nearest_miss([one], Goal(1, point.figures.seconds / late), 0.5))

    thick = 16 * point.num_devices  # sequences of 4,096: 65,536 tokens a device
    assert f"or about {math.ceil(1.5 * point.num_nodes)} nodes (--max-nodes)" in advice(1.5, thick)
    far, thin = advice(4.0, thick), advice(58.0, thick)
    assert far.endswith("or with more nodes (--max-nodes)")
    assert "--global-batch-tokens" not in far
    assert "about" not in thin
    assert "also need a larger batch (--global-batch-tokens)" in thin
    assert "a device has 1,1" in thin


def test_a_miss_of_two_limits_names_both(found: Clusters) -> None:
    def too_much(point: Point) -> Point:
        return replace(point, in_time=False, affordable=False)

    miss = nearest_miss([too_much(one) for one in found.points], Goal(1, 1.0, 1.0), 0.5)
    assert miss.days is not None
    assert miss.dollars is not None
    assert miss.nodes is None


def test_a_miss_without_a_price_asks_for_one(found: Clusters) -> None:
    """It was a traceback."""
    point = found.points[-1]
    assert point.figures is not None
    unknown = replace(point, figures=replace(point.figures, cost=None, capex=None), affordable=False)
    miss = nearest_miss([unknown], Goal(1, None, 1.0), 0.5)
    assert miss.dollars is None
    assert missed(miss).endswith("it would meet the limits with a price (--price, --capex)")
    late = missed(nearest_miss([replace(unknown, in_time=False)], Goal(1, 1.0, 1.0), 0.5))
    assert re.search(r"it would meet the limits with --days \S+ and a price \(--price, --capex\)$", late)


def test_a_purchase_with_sites_is_written(tmp_path: Path) -> None:
    bought = size("olmoe_1b_7b", ["h100-sxm-80g"], days=10, buy=True, sites="mopsim/size/sites.yaml", **JOB)
    chosen = bought.chosen
    assert chosen.figures.capex is not None
    assert chosen.figures.cost is not None
    assert chosen.figures.capex > chosen.figures.cost > 0
    assert chosen.figures.site == "norway"
    assert len(chosen.sites) == 4
    used = bought.to_json()["assumptions"]
    assert (used["pue"], used["carbon"], used["power_price"]) == (1.15, 30, 0.06)
    assert used["sources"]["carbon"].startswith("site norway: hydro")
    assert "PUE 1.15, 30 g CO2/kWh, 0.06 USD/kWh" in " ".join(stated(bought))
    bought.write(tmp_path)
    page = (tmp_path / "decision.html").read_text("utf-8")
    assert "Where it could stand" in page
    assert re.search(r"Network: .*% of the purchase", page)
    assert "1.15" in page[page.index("What this rests on") :]
    assert "machines" in page
    assert "years" in {one.name for one in bought.what_if()}


def test_the_price_stated_is_the_one_billed(tmp_path: Path) -> None:
    """Of the site that the bill is of: the first of the list was stated, or the profile's."""
    sites = tmp_path / "sites.yaml"
    sites.write_text(
        "- {name: alpha, rent: {h100-sxm-80g: 4.0}}\n- {name: beta, rent: {h100-sxm-80g: 1.1}}\n"
    )
    rented = size("olmoe_1b_7b", ["h100-sxm-80g"], days=10, sites=sites, **JOB)
    chosen = rented.chosen
    assert chosen.figures.cost == pytest.approx(1.1 * chosen.figures.device_hours)
    assert chosen.figures.site == "beta"
    machine = rented.to_json()["hardware"][0]
    assert (machine["price_per_device_hour_usd"], machine["price_source"]) == (1.1, "site beta")
    assert "in beta: price 1.1 USD/h (site beta)" in " ".join(stated(rented))
    assert "1.1 USD (site beta)" in " ".join(texts(Decision(rented))["risks"])
    assert "price" not in {one.name for one in rented.what_if()}


def test_the_fastest_within_a_limit_is_searched_for(found: Clusters) -> None:
    """Between the most that fits the limit and the least that does not every count is asked."""
    front = [one for one in found.front if one.figures and one.figures.cost]
    assert front[-1].figures is not None
    assert front[-1].figures.cost is not None
    limit = front[-1].figures.cost * 0.9
    some = size("olmoe_1b_7b", ["h100-sxm-80g"], days=10, max_cost=limit, **JOB)
    tried = some.sizings[0].tried
    for low, high in pairwise(tried):
        inside = [n for n in (3, 5, 6, 7, 10, 12, 14) if low.num_nodes < n < high.num_nodes]
        costs = [one.figures.cost for one in (low, high) if one.figures and one.figures.cost]
        assert not inside or len(costs) < 2 or (costs[0] > limit) == (costs[1] > limit)


def priced(point: Point, cost: float, days: float) -> Point:
    assert point.figures is not None
    bill = replace(point.figures, cost=cost, seconds=days * DAY, deviation=0.15)
    return replace(point, figures=bill, in_time=True, affordable=True)


def test_a_surer_cluster_of_little_more_cost_is_named(found: Clusters) -> None:
    """At a deadline of ten days: 9.5 days are even odds and a little, 7 days are sure."""
    base, request = found.points[0], replace(found.request, goal=Goal(1, 10 * DAY))
    chosen, sure, dear = priced(base, 100.0, 9.5), priced(base, 108.0, 7.0), priced(base, 111.0, 6.0)
    assert decided(request, chosen, dear).surer is None
    assert decided(request, chosen, dear, sure).surer is sure
    assert decided(request, chosen, priced(base, 105.0, 9.0), sure).surer is sure
    assert decided(request, chosen, replace(sure, affordable=False)).surer is None
    assert decided(request, sure, priced(base, 109.0, 5.0)).surer is None
    assert decided(replace(request, goal=Goal(1, None, 1e9)), chosen, sure).surer is None
    assert decided(request, replace(sure, in_time=False)).surer is None
    said = surely(sure, chosen, request)
    assert (
        "with probability >99% instead of 63% if the plan fits, at 1.08 times the cost: 7.0 days, $108"
        in said
    )
    assert surely(None, chosen, request) == ""


def test_the_page_has_the_interval_that_was_asked_for(found: Clusters, tmp_path: Path) -> None:
    chosen = found.chosen
    half = Clusters(replace(found.request, interval=0.5), found.sizings)
    assert "50 %" in half.table().columns
    assert half._level == 0.5
    half.write(tmp_path)
    page = (tmp_path / "decision.html").read_text("utf-8")
    said = page[page.index("<h1>") : page.index("What this rests on")]
    assert "90 %" not in said
    low, high = (one / DAY for one in chosen.figures.seconds_interval(0.5))
    assert f"{format_span(low)} to {format_span(high)} with 50 %" in said
    assert f"{format_days(low)}-{format_days(high)}" in said
    assert settle(chosen, found.what_if(), 0.5)[0].before < settle(chosen, found.what_if())[0].before


def test_the_page_says_how_sure_the_choice_is(found: Clusters) -> None:
    chosen, request = priced(found.points[0], 100.0, 9.5), replace(found.request, goal=Goal(1, 10 * DAY))
    decision = Decision(decided(request, chosen, priced(chosen, 108.0, 7.0)))
    assert re.search(
        r"in time with probability 63% if it fits \(50% asked\); .*\. More likely to be in time: ",
        texts(decision)["answer"][0],
    )
    odds = [format_probability(one) for one in (chosen.result.p_as_described, chosen.result.p_fits)]
    said = " ".join(texts(decision)["risks"])
    assert f"fits with probability {odds[0]}, and with a probability of 5% it needs" in said
    assert (chosen.result.device.error.off is None) == (f"the probability is {odds[1]}" not in said)
    tight = replace(chosen.result, memory_limit=int(chosen.result.peak_memory * 0.99))
    said = " ".join(texts(Decision(decided(request, replace(chosen, result=tight))))["risks"])
    assert re.search(r"it needs more than 1\d\d\.\d% of the usable device memory", said)
