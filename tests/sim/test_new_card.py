"""A profile from a data sheet: what is given, what follows it, what is assumed, and what that is worth."""

import json
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import mopsim
from mopsim.api.sensitivity import assumptions, sensitivity, value_of
from mopsim.cli import app, main
from mopsim.commands.profile import filled, taken, weights
from mopsim.common.io import to_plain
from mopsim.spec.figures import FIGURES as FIGURE_KINDS
from mopsim.spec.hardware import HardwareProfile, Quantity
from mopsim.spec.new_card import assumed_rounds, figures_of, nearest_card, new_card
from mopsim.spec.profiles import list_profiles, load_profile

NEAR = load_profile("h200-sxm-141g")


def sheet(value: float, unit: str) -> Quantity:
    return Quantity(value=value, unit=unit, tag="datasheet", source="a sheet")


FIGURES = {
    "memory": sheet(96, "GB"), "memory-bandwidth": sheet(2.4, "TB/s"), "bf16": sheet(494.7, "TFLOP/s"),
    "scale-up": sheet(225, "GB/s"), "power": sheet(400, "W"),
}  # fmt: skip


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str, typed: str = "") -> int:
    monkeypatch.setattr(sys, "argv", ["mopsim", "profile", "new", *arguments])
    monkeypatch.setattr(sys, "stdin", StringIO(typed))
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def tags(node: Any, found: set[str]) -> set[str]:
    if isinstance(node, dict):
        found |= {node["tag"]} if "tag" in node else set()
        node = list(node.values())
    for one in node if isinstance(node, list | tuple) else ():
        tags(one, found)
    return found


def test_what_follows_a_figure_scales_with_it() -> None:
    card = new_card("new", FIGURES, NEAR)
    half = pytest.approx(0.5, rel=1e-3)
    assert card.device.memory_bandwidth.si / NEAR.device.memory_bandwidth.si == half  # 2.4 of 4.8 TB/s
    assert card.device.adam_rate.si / NEAR.device.adam_rate.si == half
    rates = {one.dtype: one.peak.si for one in card.device.matmul}
    assert [rates[one.dtype] / one.peak.si for one in NEAR.device.matmul] == [half] * len(rates)
    for name, curve in card.scale_up.collectives.items():
        assert curve.bandwidth.si / NEAR.scale_up.collectives[name].bandwidth.si == half
    assert card.node_power.si == pytest.approx(10200 - 8 * 300)
    assert card.scale_out == new_card("other", {}, NEAR).scale_out


def test_what_is_not_given_is_assumed_and_says_of_which_card() -> None:
    assert tags(to_plain(new_card("new", {}, NEAR)), set()) == {"assumed"}
    card = new_card("new", FIGURES, NEAR)
    assert card.device.memory.tag == card.device.matmul[0].peak.tag == "datasheet"
    assert card.host.link_h2d.tag == "assumed"
    assert card.host.link_h2d.source.startswith("as h200-sxm-141g (measured): nvbandwidth")


def test_a_figure_that_follows_another_is_not_called_the_near_cards() -> None:
    given = {name: FIGURES[name].text for name in ("bf16", "power")}
    shown = Console(file=StringIO(), width=120, record=True)
    shown.print(filled(new_card("new", FIGURES, NEAR), NEAR, given))
    said = {line.split()[0]: line for line in shown.export_text().splitlines() if line.strip()}
    assert "7.8 kW  assumed: 10.2 kW of h200-sxm-141g by GPU power" in said["node-power"]
    assert "of h200-sxm-141g by bf16 rate" in said["fp8"]
    assert said["host-link"].rstrip().endswith("assumed, as h200-sxm-141g")
    shown.print(filled(new_card("new", {}, NEAR), NEAR, {}))
    assert " by " not in shown.export_text()


def test_only_an_assumed_price_is_said_to_move_the_cost() -> None:
    base = mopsim.simulate(
        "tiny", "cpu-2core", seq_len=256, global_batch=4, strategy=mopsim.mop(dtype="float32")
    )
    shown = Console(file=StringIO(), width=120, record=True)
    for assumed in (True, False):
        shown.print(weights([], base.result, "a job", price_assumed=assumed))
        assert ("The price is assumed" in shown.export_text()) is assumed


def test_a_card_is_nearest_to_itself() -> None:
    known = [load_profile(name) for name in list_profiles()]
    for one in known:
        if one.device.architecture:
            found = nearest_card(known, figures_of(one), one.device.architecture)
            own, its = (
                {name: figure.si for name, figure in figures_of(card).items()} for card in (one, found)
            )
            assert own == its  # a card on two networks has two profiles
    with pytest.raises(mopsim.MopError, match="architecture: 'volta' is not one of ada, ampere"):
        nearest_card(known, {}, "volta")


def test_sensitivity_moves_what_it_says() -> None:
    card = new_card("new", FIGURES, NEAR)
    job = {"nodes": 1, "seq_len": "4K", "global_batch": 16, "strategy": mopsim.mop(expert_parallel=8)}
    found = sensitivity(mopsim.simulate("olmoe_1b_7b", card, **job))
    names = [one.name for one in found]
    assert names == list(dict.fromkeys(names))
    assert {"device.matmul.*.efficiency", "scale_up.collectives.*.bandwidth", "host.link_h2d"} <= set(names)
    base = mopsim.simulate("olmoe_1b_7b", card, **job).result
    assert [one.swing(base) for one in found] == sorted((one.swing(base) for one in found), reverse=True)
    products = next(one for one in found if one.name == "device.matmul.*.efficiency")
    lower, higher = products.steps(base)
    assert higher < 0 < lower


def test_a_range_has_both_ends_and_one_meaning() -> None:
    """'0.7 to 1' lost its end as a unit; the 1 was the limit that power sets."""
    card = to_plain(new_card("new", {}, NEAR))
    ranges = {name: value_of(card, paths) for name, paths in assumptions(card).items()}
    assert {"device.matmul.*.efficiency", "device.matmul.*.held"} <= set(ranges)
    assert not ranges["device.matmul.*.efficiency"].endswith(" to 1")
    assert value_of({"a": 0.7, "b": 1.0}, [("a",), ("b",)]) == "0.7 to 1"
    assert value_of({"a": {"value": 0.013, "unit": "1"}}, [("a",)]) == "0.013"


def test_only_assumptions_are_weighed() -> None:
    assert "device.memory" not in assumptions(to_plain(new_card("new", FIGURES, NEAR)))
    assert "device.memory" in assumptions(to_plain(new_card("new", {}, NEAR)))


def test_the_command_asks_and_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, said = tmp_path / "new.yaml", tmp_path / "new.json"
    typed = "new-card\na sheet\nhopper\n8\n96 GB\n4.0TB/s\nmany\n148\n" + "\n" * 7 + "1.2\n"
    job = ["--model", "olmoe_1b_7b", "--nodes", "1", "--seq-len", "4K", "--global-batch", "16"]
    options = ["--family", "mop", "--budget", "1", "--json", str(said)]
    assert call(monkeypatch, "--ask", "--out", str(out), *job, *options, typed=typed) == 0
    card = mopsim.load_hardware(out)
    assert (card.name, card.device.memory.si, card.device.architecture) == ("new-card", 96e9, "hopper")
    assert card.price_per_device_hour.value == 1.2
    printed, complained = capsys.readouterr()
    assert "bf16: 'many' is not a number of FLOP/s" in complained  # and asked again
    assert "with each assumption 20 % lower and higher" in printed
    assert "The price is assumed" not in printed
    found = json.loads(said.read_text())
    assert found["assumptions"][0].keys() >= {"name", "value", "step_time_lower", "step_time_higher"}


@pytest.mark.parametrize(
    ("figure", "text", "si"),
    [
        ("memory", "80GB", 80e9), ("memory-bandwidth", "3.35TBps", 3.35e12),
        ("bf16", "1,979 TFLOPS", 1.979e15),
        ("bf16", "989.5 teraflops", None), ("fp8", "4 PFlop/s", 4e15), ("nic", "400Gb/s", 5e10),
        ("nic", "3.2 Tbps", 4e11), ("nic", "400 Gbit/s", 5e10), ("power", "700 watts", 700.0),
        ("node-power", "10.2KW", 10200.0), ("price", "$2.50", 2.5), ("price", "2.5 USD/hour", 2.5),
        ("scale-up", "450 GB", None), ("memory", "80 Gb/s", None), ("nic", "1,2 TB/s", None),
        ("power", "1 MW", None), ("power", "700 mW", None),
    ],
)  # fmt: skip
def test_units_are_read_as_data_sheets_spell_them(figure: str, text: str, si: float | None) -> None:
    read = next(one for one in FIGURE_KINDS if one.name == figure).read
    if si is None:
        with pytest.raises(mopsim.MopError, match=f"{figure}: .* is not a number of"):
            read(text, "datasheet", "a sheet")
    else:
        assert read(text, "datasheet", "a sheet").si == pytest.approx(si)


def test_the_help_says_what_each_figure_is() -> None:
    command = app.parser.commands["profile"].commands["new"]
    shown = {option.opts[0][2:]: option.help for option in command.params}
    for figure in FIGURE_KINDS:
        assert shown[figure.name] == f"{figure.meaning}, {figure.unit}"
        assert ("half of" in figure.meaning) == (figure.name in ("scale-up", "nic"))


def test_an_assumed_architecture_is_said() -> None:
    guessed, named = taken(NEAR, ""), taken(NEAR, "hopper")
    assert "h200-sxm-141g. That the new card is hopper too, whose kernels it gets, is assumed" in guessed
    assert "Nearest hopper card" in named
    assert "assumed" not in named


MISTAKES = [
    (["--ask"], "--ask: standard input ended before an answer to 'name of the machine type"),
    (["--name", "x"], "--source: not given"),
    (["--source", "x"], "--name: not given"),
    (
        ["--name", "x", "--source", "s", "--memory", "96 TFLOP/s"],
        "memory: '96 TFLOP/s' is not a number of B, KB",
    ),
    (["--name", "x", "--source", "s", "--bf16", "1e400"], "bf16: '1e400' is above 1e+17 FLOP/s"),
    (["--name", "../x", "--source", "s"], "name: '../x' must be a plain file name"),
    (["--name", "..", "--source", "s"], "name: '..' must be a plain file name"),
    (["--name", "x", "--source", "s", "--nic", "fast"], "nic: 'fast' is not a number of B/s"),
    (["--name", "x", "--source", "s", "--model", "nope"], "model: 'nope' is neither a preset nor a file"),
    (["--name", "x", "--source", "s", "--near", "a", "--architecture", "b"], "architecture: 'b' has no use"),
    (["--name", "x", "--source", "s", "--near", "h900"], "near: 'h900' is neither a profile nor a file"),
    (
        ["--name", "x", "--source", "s", "--near", "a100-sxm-80g", "--fp8", "1"],
        "fp8: a100-sxm-80g has no fp8",
    ),
    (
        ["--name", "x", "--source", "s", "--near", "h200-sxm-141g", "--nic", "50TB/s"],
        "is faster than device.mem",
    ),
    (["--name", "x", "--source", "s", "--memory", "96TB"], "memory: 96 TB must lie within 20 times of what"),
    (["--name", "x", "--source", "s", "--price", "0USD/h"], "price: 0 USD/h must lie within 20 times"),
    (
        ["--name", "x", "--source", "s", "--power", "9kW", "--node-power", "7kW"],
        "node-power: 7 kW must be at least the power of a device (9 kW)",
    ),
]


@pytest.mark.parametrize(("arguments", "says"), MISTAKES)
def test_a_mistake_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    arguments: list[str], says: str,
) -> None:  # fmt: skip
    assert call(monkeypatch, *arguments, "--out", str(tmp_path / "new.yaml")) == 2
    err = capsys.readouterr().err
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", ["host.link_h2d", "scale_up.peak", "scale_out.peak"])
def test_a_link_faster_than_memory_is_refused_with_the_reason(field: str) -> None:
    data = to_plain(NEAR)
    part, name = field.split(".")
    data[part][name] = {**data[part][name], "value": 4.2, "unit": "TB/s"}
    with pytest.raises(
        mopsim.MopError, match=f"hardware.{field}: 4.2 TB/s is faster than device.memory_bandwidth"
    ):
        mopsim.common.io.convert(data, HardwareProfile, "hardware")


def test_rounds_of_a_card_that_is_probed_are_those_of_its_architecture() -> None:
    """DeepEP's kernels are in no probe; without rounds rows would arrive at the links' rate."""
    known = [load_profile(name) for name in list_profiles()]
    for architecture, card in (("hopper", "h100-sxm-80g"), ("blackwell", "b200-sxm-192g")):
        found, timed = assumed_rounds(known, architecture), load_profile(card).scale_up.rounds
        assert found
        assert timed
        assert (found.wait.si, found.copy.si) == (timed.wait.si, timed.copy.si)
        assert (found.link is None, found.row is None) == (timed.link is None, timed.row is None)
        assert {found.wait.tag, found.copy.tag} == {"assumed"}
        assert found.wait.source.startswith(f"as {card}")
    assert assumed_rounds(known, "ampere") is None
    assert assumed_rounds(known, "") is None
