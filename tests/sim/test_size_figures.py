"""Sizing's arithmetic by hand: failures and checkpoints, the network's bill, rent and purchase, chances."""

import math
import re
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mopsim.common.errors import MopError
from mopsim.report.sizing_plots import dollars, label_of
from mopsim.size import Goal, Step, Terms, assume, figures
from mopsim.size.assumptions import Assumptions, Site, known, node_prices, read_sites, read_values, with_capex
from mopsim.size.fabric import network
from mopsim.size.figures import DAY, YEAR_HOURS
from mopsim.size.goodput import checkpoint_interval, goodput, spare_nodes, wall_clock
from mopsim.size.whatif import End, Swing
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.profiles import list_profiles, load_profile
from tests.sim.toys import machine, quantity

H100 = load_profile("h100-sxm-80g")


def test_every_assumption_has_a_source_and_lies_within_its_bounds() -> None:
    assert all(one.source and one.says for one in known().values())
    assert set(node_prices()) == set(list_profiles())
    assert all(one.low <= one.value <= one.high for one in node_prices().values())


def test_the_checkpoint_interval_is_youngs_to_first_order_and_dalys_optimum() -> None:
    """60 s every 10^6 s of failures: sqrt(2 x 60 x 10^6) = 10,954 s; no other interval loses less."""
    best = checkpoint_interval(60.0, 1e6)
    assert best == pytest.approx(math.sqrt(2 * 60 * 1e6), rel=0.01)
    least = wall_clock(best, 60.0, 600.0, 1e6)
    for other in (best / 2, best * 0.9, best * 1.1, best * 2):
        assert wall_clock(other, 60.0, 600.0, 1e6) > least * 0.9999999
    assert checkpoint_interval(60.0, 20.0) == 20.0


def test_without_failures_only_checkpoints_and_stragglers_cost() -> None:
    a = assume({"failure_rate": 0.0})
    good = goodput(H100, 2, 1e12, a)
    assert good.share == pytest.approx(86400 / (86400 + good.blocked))
    assert math.isinf(good.mtbf)
    assert good.spares == 0


def test_llama_3_trained_nine_tenths_of_its_time_and_stopped_every_three_hours() -> None:
    """arXiv 2407.21783: 16,384 H100, 419 interruptions in 54 days, more than 90 % of the time effective;
    405 billion parameters of 12 bytes a checkpoint."""
    good = goodput(H100, 2048, 405e9 * 12, assume())
    assert good.mtbf == pytest.approx(54 * DAY / 419, rel=0.01)
    lost = good.lost["checkpoints"] + good.lost["restarts"] + good.lost["work done again"]
    assert 0.01 < lost < 0.12
    assert sum(good.lost.values()) == pytest.approx(1 - good.share)


@settings(deadline=None)
@given(nodes=st.integers(1, 4096), more=st.integers(1, 4096))
def test_more_nodes_train_a_smaller_share_of_the_time(nodes: int, more: int) -> None:
    a = assume()
    few, many = (goodput(H100, n, 3e12, a) for n in (nodes, nodes + more))
    assert many.mtbf < few.mtbf
    assert many.share / many.ready < few.share / few.ready + 0.005  # checkpoints are faster on more nodes


@pytest.mark.parametrize("nodes", [1, 64, 512])
def test_a_checkpoint_stops_training_for_the_stall_at_least(nodes: int) -> None:
    """However fast many devices write it: a synchronous one for the write too."""
    shares = {}
    for stall in (0.0, 6.3, 20.0):
        later, now = (
            goodput(H100, nodes, 366e9, assume({"checkpoint_stall": stall, "checkpoint_asynchronous": one}))
            for one in (1, 0)
        )
        assert later.blocked >= stall
        assert now.blocked == max(later.write, stall)
        assert stall == 0 or later.blocked == stall
        shares[stall] = later.share
    assert shares[0.0] > shares[6.3] > shares[20.0]


@pytest.mark.parametrize("nodes", [64, 512])
def test_every_end_of_what_if_moves_the_bill(nodes: int) -> None:
    """A purchase of machines without a rated node, without an interval of the step: has all but
    `reserved_factor`, which is of a reserved rent, and `rent_spread`, which is the what-if's own."""
    hardware, prices = msgspec.structs.replace(H100, node_power=None), {H100.name: node_prices()[H100.name]}

    def bill(a: Assumptions, *, reserved: bool) -> tuple[float | None, ...]:
        terms = Terms(reserved=True) if reserved else Terms(buy=True, capex=prices)
        one = figures(hardware, nodes, Step(1e6, 366e9), Goal(10**12, DAY), a, terms)
        return one.seconds, one.cost, one.energy, one.carbon, one.deviation

    for name, one in known().items():
        reserved = name == "reserved_factor"
        for value in {one.low, one.high} - {one.value}:
            moved = bill(assume().with_(**{name: value}), reserved=reserved)
            same = moved == bill(assume(), reserved=reserved)
            assert same == (name == "rent_spread"), (name, value)


def test_without_room_for_its_copy_on_the_host_training_waits_for_a_checkpoint() -> None:
    """1.6 TB on 16 devices are 100 GB of each one's host: as if it were synchronous."""
    room, none = (goodput(H100, 2, 1.6e12, assume(), one) for one in (100e9, 99e9))
    asked = goodput(H100, 2, 1.6e12, assume({"checkpoint_asynchronous": 0}))
    assert (room.asynchronous, none.asynchronous) == (True, False)
    assert none == asked
    assert none.blocked > 10 * room.blocked


def test_only_speeds_that_the_profile_does_not_know_cost_goodput() -> None:
    """The simulated step waits for the slowest device of the profile's spread."""
    known, wider, alike = (
        goodput(H100, 512, 1e12, assume({"straggler_spread": spread})) for spread in (0.013, 0.02, 0.0)
    )
    assert known.lost["stragglers"] == alike.lost["stragglers"] == 0
    assert 0.02 < wider.lost["stragglers"] < 0.03
    assert alike.share > known.share > wider.share


def test_spares_make_a_useful_second_cheapest() -> None:
    """1,250 nodes of 8 devices, one failure per 10,000 device-hours, a day of repair: 24 are broken on
    average, so more than 24 stand by, and one more or less costs more. A node alone has none."""
    a = assume({"failure_rate": 1e-4, "hardware_share": 1.0, "repair_time": 86400})
    spares, ready = spare_nodes(1250, H100, a)
    assert 24 < spares < 60
    assert 0.98 < ready < 1
    assert spare_nodes(1, H100, a)[0] == 0
    assert spare_nodes(1250, H100, assume({"failure_rate": 0.0})) == (0, 1.0)


def test_a_network_of_1024_gpus_is_the_published_one() -> None:
    """NVIDIA Quantum-2: 1,024 ports on 64-port switches take 32 leaves and 16 spines."""
    found = network(H100, 128, assume())
    assert (found.ports, found.tiers, found.switches, found.links) == (1024, 2, 48, 2048)
    assert 1.75e6 < found.price < 2.35e6
    assert network(H100, 1, assume()).switches == 0
    assert network(H100, 8, assume()).tiers == 1
    assert network(H100, 512, assume()).tiers == 3
    scale_out = msgspec.structs.replace(H100.scale_out, oversubscription=3.0)
    cheap = network(msgspec.structs.replace(H100, scale_out=scale_out), 128, assume())
    assert cheap.switches < 40
    with pytest.raises(MopError, match="too few for"):
        network(H100, 60000, assume({"switch_ports": 16}))


def bought() -> HardwareProfile:
    return msgspec.structs.replace(machine(), name="toy", node_power=quantity(8, "kW"))


def test_a_purchase_by_hand() -> None:
    """One node of 100,000 USD over 2 years without interest, residual, storage, staff or support, always in
    use: 100,000 / (2 x 8,766 h) an hour; 8 kW at 0.1 USD/kWh and 100 USD/kW/month beside it."""
    values = {
        "years": 2, "interest": 0, "residual": 0, "usage": 1, "support_share": 0, "staff_cost": 0,
        "storage_capacity": 0, "space_price": 100, "power_price": 0.1, "pue": 1, "draw_share": 1,
    }  # fmt: skip
    terms = Terms(buy=True, capex=with_capex({}, {"toy": 1e5}))
    bill = figures(bought(), 1, Step(1e6), Goal(10**12, DAY), assume(values, 1.0), terms)
    hours = 1e6 / 3600
    assert bill.capex == pytest.approx(1e5)
    assert bill.parts["machines"] == pytest.approx(1e5 / (2 * YEAR_HOURS) * hours)
    assert bill.parts["space"] == pytest.approx(100 * 12 * 8 / YEAR_HOURS * hours)
    assert bill.parts["energy"] == pytest.approx(8 * hours * 0.1)
    assert bill.cost == pytest.approx(sum(bill.parts.values()))
    assert bill.outlay == bill.capex


def test_racks_are_paid_whole() -> None:
    rack = load_profile("gb200-186g")
    bill = figures(rack, 16, Step(1e6), Goal(10**12, DAY))
    assert bill.billed_nodes == 18
    assert bill.device_seconds == pytest.approx(bill.seconds * 72)


def test_prices_of_a_site_a_user_and_a_term() -> None:
    site = Site(name="here", rent={"h100-sxm-80g": 1.5}, pue=1.1, carbon=30)
    a = assume()
    listed = H100.price_per_device_hour

    def paid(terms: Terms, where: Site) -> tuple[float, str]:
        price = terms.price(H100, where, a)
        return price.dollars, price.source.split(":")[0]

    assert paid(Terms(), Site(name="x")) == (listed.si, listed.tag)
    reserved = paid(Terms(reserved=True), Site(name="x"))
    assert reserved == (listed.si * a.reserved_factor, f"{listed.text} x 0.65 reserved; {listed.tag}")
    assert paid(Terms(), site) == (1.5, "site here")
    assert paid(Terms(rent={"h100-sxm-80g": 9.0}), site) == (9.0, "given")
    clean = figures(H100, 4, Step(1e6), Goal(10**12, DAY), a, Terms(), site)
    dirty = figures(H100, 4, Step(1e6), Goal(10**12, DAY), a)
    assert clean.carbon is not None
    assert dirty.carbon is not None
    assert clean.carbon / dirty.carbon == pytest.approx(30 / a.carbon * 1.1 / a.pue)


def test_the_shipped_sites_are_read() -> None:
    assert next(site.name for site in read_sites("mopsim/size/sites.yaml")) == "united-states"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- name: a\n  pue: 0.5\n", "site 1.pue: 0.5 must lie between 1 and 5"),
        ("- name: a\n- name: a\n", "has a name twice"),
        ("name: a\n", "must be a list of sites"),
        ("- name: a\n  rent: {h100-sxm-80g: -1}\n", "site 1.rent.h100-sxm-80g: -1.0 must be above 0"),
        ("- name: a\n  colour: red\n", "site 1.colour: 'red' is an unknown field"),
    ],
)
def test_a_site_that_cannot_be_is_refused_by_name(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "sites.yaml").write_text(text)
    with pytest.raises(MopError, match=re.escape(says)):
        read_sites(tmp_path / "sites.yaml")


def test_chances_of_the_deadline() -> None:
    """The median is even odds; the interval of 90 % leaves 5 % on either side; certain where nothing
    spreads."""
    bill = figures(H100, 64, Step(1e6), Goal(10**13, DAY))
    low, high = bill.seconds_interval()
    assert bill.p_within(bill.seconds) == pytest.approx(0.5)
    assert bill.p_within(high) == pytest.approx(0.95)
    assert bill.p_within(low) == pytest.approx(0.05)
    assert bill.p_within(None) is None
    sharp = figures(
        H100, 64, Step(1e6), Goal(10**13, DAY), assume({"step_time_spread": 0, "failure_rate": 0})
    )
    assert sharp.p_within(sharp.seconds * 0.999) == 0.0
    assert sharp.p_within(sharp.seconds) == 1.0


def test_chances_of_the_budget() -> None:
    """Rent is paid by the hour, and its interval is that of the days; a purchase is paid at once."""
    bill = figures(H100, 64, Step(1e6), Goal(10**13, DAY), terms=Terms(rent={H100.name: 2.0}))
    interval = bill.cost_interval()
    assert bill.cost is not None
    assert interval is not None
    assert bill.p_budget(bill.cost) == pytest.approx(0.5)
    assert bill.p_budget(interval[0]) == pytest.approx(0.05)
    assert bill.p_budget(interval[1]) == pytest.approx(0.95)
    assert bill.p_budget(None) is None
    assert replace(bill, cost=None, parts={}).p_budget(1.0) is None
    assert replace(bill, capex=1.0, parts={"machines": bill.cost}).p_budget(1.0) is None


def test_a_steps_own_interval_moves_the_median() -> None:
    step = Step(1e6, 0.0, low=1.0, high=1.44)
    a = assume({"failure_rate": 0})
    bill = figures(H100, 64, step, Goal(10**13, DAY), a)
    point = figures(H100, 64, Step(1e6), Goal(10**13, DAY), a).seconds
    assert bill.seconds == pytest.approx(point * 1.2)
    assert bill.seconds_interval()[0] == pytest.approx(point, rel=1e-6)


@pytest.mark.parametrize("tokens", [1, 10**6, 10**15])
def test_intervals_of_runs_of_any_length_are_finite(tokens: int) -> None:
    """A failure in a run of milliseconds multiplies its time by millions."""
    bill = figures(H100, 4, Step(1e9), Goal(tokens, DAY))
    low, high = bill.seconds_interval(0.999)
    assert 0 < low < bill.seconds < high < math.inf


def test_a_price_may_be_of_all_machines_that_are_asked_for() -> None:
    machines = ("h200-sxm-141g", "mi300x-192g")
    assert read_values(["3.1"], "--price", machines) == dict.fromkeys(machines, 3.1)
    with pytest.raises(MopError, match=r"--price h200-sxm-141g: 4 is its second value, 3.1 is its first"):
        read_values(["3.1", "h200-sxm-141g=4"], "--price", machines)
    with pytest.raises(MopError, match=r"--assume: '3.1' is neither NAME=VALUE nor a YAML file"):
        read_values(["3.1"], "--assume")


def test_costs_are_drawn_in_a_unit_of_their_size() -> None:
    units = {2.6e4: "thousand USD", 3e6: "million USD", 12.0: "USD", 0.0: "USD"}
    assert {most: dollars([0.0, most])[1] for most in units} == units


def test_inputs_of_a_tornado_are_in_words_and_units() -> None:
    def said(name: str, unit: str, low: float, high: float) -> str:
        ends = (End(value, 1.0, None, None) for value in (low, high))
        return label_of(Swing(name, "", unit, *ends, ""))

    assert said("repair_time", "s", 14400, 432000) == "repair time, hours"
    assert said("matmul", "x", 0.9, 1.1) == "matrix products, times the profile's seconds"
    assert said("global_batch_tokens", "tokens", 5e5, 2e6) == "tokens of a step, thousand"
    assert said("hardware_share", "1", 0.6, 0.9) == "interruptions that need a repair"
    assert said("failure_rate", "1/h", 1.2e-5, 3.4e-5).endswith(", in a million device-hours")
