"""Sizing: a bill computed by hand, node counts and batches that divide, and an answer that holds."""

import dataclasses
import json
from math import lcm
from pathlib import Path
from unittest.mock import patch

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.common.units import parse_tokens
from mopsim.report.sizing import stated
from mopsim.search import staged
from mopsim.size import Goal, Point, Request, Sizing, Step, assume, figures, size_all
from mopsim.size.counts import global_batch, least_nodes, node_counts
from mopsim.size.decided import Decided
from mopsim.size.figures import DAY, Terms
from mopsim.size.goodput import rack_nodes, whole_racks
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.plan import Plan
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.training import TrainSpec
from tests.called import call
from tests.sim.toys import machine, quantity, small

MODEL = small()


def priced(name: str = "toy", price: float = 2.0) -> HardwareProfile:
    """The toy machine at `price` dollars a device hour, 500 W a device."""
    toy = machine()
    device = msgspec.structs.replace(toy.device, power=quantity(500, "W"))
    return msgspec.structs.replace(
        toy, name=name, device=device, price_per_device_hour=quantity(price, "USD/h")
    )


def size(request: Request, hardware: HardwareProfile) -> Sizing:
    """The answer for one machine type; what promises most is told by a sixth of the layers of a search."""
    with patch.object(staged, "KNOWN", 100):
        return size_all(request, [hardware])[0]


AS_SIMULATED = assume({"step_time_spread": 0.1})
"""Whatever published runs teach of a stack: the median of days is what is simulated."""


def request(seconds: float, tokens: int = 10**12, max_nodes: int = 64) -> Request:
    goal = Goal(tokens, seconds)
    return Request(MODEL, goal, 512, 2**17, ("fsdp2",), max_nodes=max_nodes, simulations=1)


def test_the_bill_by_hand() -> None:
    """10^12 tokens at 10^6 tokens/s, half the time useful: 2*10^6 s; 2 nodes of 8 devices: 3.2*10^7 device
    seconds; at 2 USD/h 17,777.78 USD; at 500 W drawn and PUE 1.5 2.4*10^10 J for them."""
    a = assume({"pue": 1.5, "draw_share": 1.0, "switch_power": 0.0, "node_over_devices": 1.0}, 0.5)
    bill = figures(priced(), 2, Step(1e6), Goal(10**12, 30 * DAY), a)
    assert bill.seconds == pytest.approx(2e6)
    assert bill.days == pytest.approx(2e6 / 86400)
    assert bill.device_seconds == pytest.approx(3.2e7)
    assert bill.cost == pytest.approx(2 * 3.2e7 / 3600)
    assert bill.energy == pytest.approx(500 * 1.5 * 3.2e7)


def test_energy_counts_the_whole_node() -> None:
    """6 kW a node of 8 is 750 W a device, of which the device itself draws 500; a host is assumed where the
    profile has none."""
    node = msgspec.structs.replace(priced(), node_power=quantity(6, "kW"))
    goal, a = Goal(10**12, 30 * DAY), assume({"pue": 1.2, "draw_share": 1.0, "switch_power": 0.0}, 0.5)
    assert figures(node, 2, Step(1e6), goal, a).energy == pytest.approx(750 * 1.2 * 3.2e7)
    _, searched, known, unknown = stated(
        Decided(request(DAY), [Sizing(m, None, []) for m in (node, priced())])
    )
    assert searched.startswith(
        "Searched: fsdp2, 1 simulation of each at a node count that is searched, up to 4 where"
    )
    assert "power of a node of 8 devices 6 kW (assumed: toy)" in known
    assert (
        "power of a node of 8 devices 7.2 kW (assumed: 1.8 times its devices'; 500 W (assumed: toy))"
        in unknown
    )
    assumed = figures(priced(), 2, Step(1e6), goal, a)
    assert assumed.energy == pytest.approx(1.8 * 500 * 1.2 * 3.2e7)


def test_what_the_profile_does_not_say_is_none() -> None:
    bill = figures(machine(), 1, Step(1e6), Goal(10**12, DAY))
    assert bill.cost is None
    assert bill.energy is None


@pytest.mark.parametrize(
    ("text", "tokens"), [("1T", 10**12), ("15T", 15 * 10**12), ("500B", 5 * 10**11), ("1.5T", 15 * 10**11),
                         ("2e12", 2 * 10**12), ("1000", 1000), ("20M", 2 * 10**7)],
)  # fmt: skip
def test_tokens_are_decimal(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "T", "-1T", "1Q", "0", "nan", "1TB"])
def test_tokens_refused(text: str) -> None:
    with pytest.raises(MopError, match="is not a number of tokens"):
        parse_tokens(text)


def test_node_counts_have_many_factors() -> None:
    assert node_counts(20) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20]
    assert node_counts(1) == [1]
    assert node_counts(1, 18) == [1]


def test_whole_racks_are_node_counts() -> None:
    """18 nodes are paid for where 16 train."""
    assert {18, 36, 54, 72, 90, 108, 126, 144} <= set(node_counts(144, 18))
    assert set(node_counts(144)) <= set(node_counts(144, 18))
    rack = load_profile("gb300-288g")
    assert whole_racks(rack, 16) == rack_nodes(rack) == 18
    world = 18 * rack.devices_per_node
    assert global_batch(world, 2**8) % world == 0


def test_a_rack_that_is_paid_for_is_tried_whole() -> None:
    """Of 18 nodes sixteen trained: 90 dollars, where all do 85."""
    rack = msgspec.structs.replace(priced(), scale_up_size=18 * priced().devices_per_node)
    best = size(request(3 * DAY, max_nodes=48), rack).best
    assert best.num_nodes == whole_racks(rack, best.num_nodes)


@settings(deadline=None)
@given(
    nodes=st.sampled_from(node_counts(512)),
    wanted=st.floats(1 / 16, 2**16),
    least=st.sampled_from([1, 2, 6, 24]),
)
def test_a_global_batch_divides_over_the_ranks(nodes: int, wanted: float, least: int) -> None:
    world = 8 * nodes
    batch, whole = global_batch(world, wanted, least), lcm(world, least)
    assert batch % least == 0
    assert batch % whole == 0 or whole % batch == 0
    if wanted >= whole:
        assert abs(batch - wanted) <= max(wanted / 8, whole / 2)


def test_a_global_batch_leaves_room_for_microbatches() -> None:
    """1,024 sequences on 48 ranks: 3 x 48 x 8 = 1,152 is an eighth off; on 64 ranks nothing is."""
    assert global_batch(48, 1024) == 1152
    assert global_batch(64, 1024) == 1024
    assert global_batch(64, 4) == 4
    assert global_batch(64, 100, 24) == 96


def test_the_cheapest_cluster_trains_in_time_and_a_smaller_one_tried_does_not() -> None:
    alone = size(request(400 * DAY, max_nodes=1), priced()).best
    seconds = alone.figures.seconds / 5  # so five nodes, or a few more
    goal = request(seconds, max_nodes=16)
    sizing = size(goal, priced())
    assert sizing.best.num_nodes > 1
    assert sizing.best.figures.seconds <= seconds
    assert sizing.best.result.sure
    cost = sizing.best.figures.cost
    assert cost is not None
    done = [point.figures.cost for point in sizing.tried if point.in_time and point.figures]
    assert cost == min(one for one in done if one is not None)
    allowed = node_counts(16)
    before = allowed[allowed.index(sizing.best.num_nodes) - 1]
    least = least_nodes(MODEL, priced(), 512, goal.goal.tokens, seconds)
    assert before < least or any(point.num_nodes == before for point in sizing.tried)


def test_a_longer_deadline_is_never_dearer_and_what_one_finds_all_find() -> None:
    """On one machine type a count's plan was once known under one deadline and missed under the next, and the
    counts between two were not asked: 128 nodes for 2.45 days where 80 were known for 2.7."""
    machine, model = load_profile("h200-sxm-141g"), load_model("qwen3_30b_a3b")
    found = []
    for days in (2.1, 2.45):
        goal = Goal(10**12, days * DAY)
        asked = Request(model, goal, 4096, 2**22, ("fsdp2",), max_nodes=160, assumptions=AS_SIMULATED)
        best = size(asked, machine).best
        found.append((best.figures.cost or 0.0, best.figures.days, best.num_nodes))
    assert found == sorted(found, reverse=True)
    assert [nodes for _, _, nodes in found] == [160, 80]


def test_a_budget_pays_for_the_fastest_cluster_that_it_can() -> None:
    """What a run costs hardly changes with its nodes: 5 of them were the answer for 30 days where 32 cost as
    much for 4.5. Of a quarter of the layers 20 cost $94,286, 16 $89,424, one $83,305."""
    machine, model = load_profile("h200-sxm-141g"), load_model("qwen3_30b_a3b")
    model = msgspec.structs.replace(model, num_hidden_layers=12, total_params=None, active_params=None)
    goal = Goal(4 * 10**12, None, 92_000)
    terms = Terms(rent={machine.name: 3.5})
    asked = Request(model, goal, 4096, 2**22, ("fsdp2",), max_nodes=20, assumptions=AS_SIMULATED, terms=terms)
    best = size(asked, machine).best
    assert best.num_nodes == 16


def test_too_slow_says_so_and_how_long_the_largest_takes() -> None:
    sizing = size(request(1.0), priced())
    assert sizing.best is None
    assert "not fast enough" in sizing.why
    assert [point.num_nodes for point in sizing.tried] == [64]
    assert sizing.tried[0].figures is not None


def test_why_none_will_do_is_said_of_the_cluster_that_comes_nearest() -> None:
    """Of a budget alone the largest cluster was named, nine times as dear as the cheapest; that one is what
    other machine types are compared with."""
    asked = dataclasses.replace(request(DAY, max_nodes=8), goal=Goal(10**12, None, 1.0))
    sizing = size(asked, priced())
    assert sizing.best is None
    bills = {point.num_nodes: point.figures for point in sizing.tried if point.figures}
    costs = {nodes: bill.cost or 0.0 for nodes, bill in bills.items()}
    nodes = min(costs, key=lambda one: costs[one])
    assert nodes < max(costs)
    assert f"too dear: ${costs[nodes]:,.0f}" in sizing.why
    assert sizing.why.endswith(f", with {nodes} node{'s' * (nodes > 1)}")
    assert sizing.rival.num_nodes == nodes
    assert sizing.bill is bills[nodes]


def test_what_does_not_fit_names_the_category() -> None:
    tiny = msgspec.structs.replace(
        priced(), device=msgspec.structs.replace(priced().device, memory=quantity(1, "MB"))
    )
    deep = dataclasses.replace(request(400 * DAY, max_nodes=1), model=small(num_hidden_layers=32))
    sizing = size(deep, tiny)
    assert sizing.best is None
    assert "the closest strategy is" in sizing.why
    assert "over on the device, stopped by" in sizing.why


def test_recommended_is_the_cheapest_and_the_fastest_keeps_the_budget() -> None:
    goal = request(DAY, max_nodes=8)
    both = [size(goal, priced("dear", 4.0)), size(goal, priced("cheap", 2.0))]
    found, poor = Decided(goal, both), Decided(dataclasses.replace(goal, max_cost=1e-6), both)
    cheapest, fastest = found.cheapest, found.fastest
    assert cheapest.hardware.name == "cheap"
    assert (poor.cheapest, poor.fastest) == (cheapest, None)
    unpriced = Point(machine(), 1, TrainSpec(seq_len=1, global_batch=1), fastest.result,
                     figures(machine(), 1, Step(1e9), Goal(1, 1)), True, "")  # fmt: skip
    alone = Decided(goal, [Sizing(unpriced.hardware, unpriced, [unpriced])])
    assert (alone.cheapest, alone.fastest, alone.chosen) == (None, unpriced, unpriced)


JOB = ["size", "--model", "tiny", "--hardware", "cpu-2core", "--seq-len", "256",
       "--global-batch-tokens", "1K", "--precision", "float32", "--family", "mop", "--simulations", "2",
       "--max-nodes", "4"]  # fmt: skip


def test_the_command_writes_json_in_si_units_and_a_plan(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plan = tmp_path / "size.json", tmp_path / "plan.yaml"
    assert (
        call(monkeypatch, *JOB, "--tokens", "1M", "--days", "1", "--json", str(out), "--plan", str(plan)) == 0
    )
    said = capsys.readouterr().out
    places = [said.index(one) for one in ("Recommended (", "Fastest", "\nmachine ", "\nAssumed: ")]
    assert places == sorted(places), "the answer first"
    found = json.loads(out.read_text())
    best = found["hardware"][0]["best"]
    assert found["tokens"] == 10**6
    assert best["cost_usd"] == pytest.approx(
        found["hardware"][0]["price_per_device_hour_usd"] * best["device_seconds"] / 3600
    )
    predicted = 1e6 / best["tokens_per_s"] / best["goodput"]
    assert best["duration_s"] == pytest.approx(predicted * best["measured_over_predicted"])
    assert found["recommended"]["nodes"] == best["nodes"]
    assert io.load(plan, Plan, "plan").hardware.num_nodes == best["nodes"]


MISTAKES = [
    (["--tokens", "many", "--days", "1"], "tokens: 'many'"),
    (["--tokens", "1M", "--days", "-1"], " --days: -1"),
    (["--tokens", "1M", "--days", "nan"], "days: nan"),
    (["--tokens", "1M", "--days", "1", "--utilisation", "2"], "utilisation: 2"),
    (["--tokens", "1M", "--days", "1", "--pue", "0.5"], "pue: 0.5"),
    (["--tokens", "1M", "--days", "1", "--family", "zero"], "family: 'zero'"),
    (["--tokens", "1M", "--days", "1", "--hardware", "h900"], "hardware: 'h900'"),
    (["--tokens", "1M", "--days", "1", "--hardware", "cpu-2core"], "hardware: 'cpu-2core' is given twice"),
    (["--tokens", "1M", "--days", "1", "--routing", "often"], "routing: 'often'"),
    (
        ["--tokens", "1M", "--days", "1", "--max-cost", "-3"],
        "--max-cost: '-3' is not an amount of dollars, above 0",
    ),
    (["--tokens", "1M", "--days", "1", "--max-nodes", "0"], "--max-nodes"),
    (["--tokens", "1M", "--budget", "-3"], "--budget: '-3' is not an amount of dollars, above 0"),
    (["--tokens", "1M"], " --days: none given"),
    (["--tokens", "1M", "--days", "1", "--confidence", "1"], "confidence: 1 must lie between"),
    (
        ["--tokens", "1M", "--days", "1", "--price", "cpu-2core=-1"],
        "--price cpu-2core: -1 must lie",
    ),
    (["--tokens", "1M", "--days", "1", "--price", "h900=1"], "price: 'h900' is not one of cpu-2core"),
    (["--tokens", "1M", "--days", "1", "--price", "cpu-2core=dear"], "cpu-2core: 'dear' is not a number"),
    (
        ["--tokens", "1M", "--days", "1", "--assume", "failure_rate=2"],
        "--assume failure_rate: 2.0 must",
    ),
    (["--tokens", "1M", "--days", "1", "--assume", "failur_rate=2"], "near: failure_rate"),
    (
        ["--tokens", "1M", "--days", "1", "--buy", "--years", "0"],
        "--years: 0.0 must lie between 0.25 and 20 years",
    ),
    (
        ["--tokens", "1M", "--days", "1", "--buy", "--capex", "cpu-2core=1e-300"],
        " --capex cpu-2core: 1e-300 must lie between 1 and 1e+09 dollars",
    ),
    (["--tokens", "1M", "--days", "1", "--years", "4"], "years: 4.0 has no use without --buy"),
    (
        ["--tokens", "1M", "--days", "1", "--capex", "cpu-2core=9"],
        "capex: 'cpu-2core=9' has no use without --buy",
    ),
    (
        ["--tokens", "1M", "--days", "1", "--price", "cpu-2core=1", "--price", "cpu-2core=2"],
        "second value, 1",
    ),
    (
        ["--tokens", "1M", "--days", "1", "--pue", "1.1", "--assume", "pue=1.2"],
        "pue: 1.1 is its second value",
    ),
    (["--tokens", "1M", "--days", "1", "--buy", "--reserved"], "reserved: has no use beside --buy"),
    (["--tokens", "1M", "--budget", "1", "--confidence", "0.9"], "confidence: 0.9 has no use without --days"),
    (["--tokens", "1M", "--days", "1", "--sites", "none.yaml"], "none.yaml: no such file"),
    (["--days", "1"], "Missing option"),
]


@pytest.mark.parametrize(("arguments", "says"), MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    at = JOB.index("--family")
    job = [*JOB[:at], *JOB[at + 2 :]] if "--family" in arguments else JOB
    assert call(monkeypatch, *job, *arguments) == 2
    err = capsys.readouterr().err
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_a_plan_of_no_cluster_is_not_written_and_the_exit_code_is_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plan = tmp_path / "never.yaml"
    assert call(monkeypatch, *JOB, "--tokens", "100T", "--days", "1", "--plan", str(plan)) == 3
    err = capsys.readouterr().err
    said = [line for line in err.splitlines() if not line.startswith("mopsim: sizing: ")]  # a slow machine's
    assert len(said) == 1
    assert f"--plan: {plan} not written: no cluster of at most" in said[0]
    assert not plan.exists()


def test_a_limit_of_devices_is_one_of_nodes_of_each_machine() -> None:
    machine = priced()
    asked = dataclasses.replace(request(3 * DAY, max_nodes=48), max_devices=20 * machine.devices_per_node + 1)
    assert asked.limit == f"48 nodes and {20 * machine.devices_per_node + 1:,} devices"
    assert (asked.flag, request(DAY, max_nodes=1).limit) == ("--max-devices", "1 node")
    assert dataclasses.replace(asked, max_nodes=None, max_devices=None).limit == "512 nodes"
    assert asked.most_nodes(machine) == 20
    assert max(point.num_nodes for point in size(asked, machine).tried) <= 20
