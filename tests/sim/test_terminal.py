"""Tables on a terminal of 80 columns: no cell is cut or wrapped."""

import io as text_io
from dataclasses import replace

import pytest
from rich.console import Console

from mopsim.common.units import format_seconds
from mopsim.context.contenders import contenders
from mopsim.context.sweep import ContextCase, ContextPoint, Curve
from mopsim.engine import simulate
from mopsim.report.context import shown_table
from mopsim.report.sizing import sizing_table
from mopsim.report.sweep import Sweep, SweepPoint, swept_table
from mopsim.report.tables import breakdown, comparison
from mopsim.size import Goal, size_all
from mopsim.size.decided import Decided
from mopsim.size.figures import DAY
from mopsim.size.points import Request
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.training import TrainSpec
from mopsim.strategies import mop


def shown(thing: object) -> list[str]:
    stream = text_io.StringIO()
    Console(file=stream, width=80).print(thing)
    return stream.getvalue().splitlines()


def rows(lines: list[str]) -> list[str]:
    """The lines between the rule of a table's head and what follows it, and the head itself."""
    rule = next(i for i, line in enumerate(lines) if "───" in line)
    return lines[rule - 1 : rule] + lines[rule + 1 :]


def test_a_large_job_stays_in_its_lines() -> None:
    hardware = load_profile("h200-sxm-141g")
    strategy = mop(
        96,
        context_parallel=8,
        expert_parallel=32,
        vocab_parallel=96,
        expert_chunk_tokens=8192,
        offload_inputs=True,
    )
    result = simulate(load_model("mop_1t"), hardware, 12, strategy, TrainSpec(seq_len=2**20, global_batch=12))
    lines = shown(comparison([result] * 12, "a job"))
    found = rows(lines)
    head = lines[lines.index(found[0]) - 1] + found[0]
    assert {"#", "step", "tokens/s", "per", "GPU", "MFU", "exposed", "memory", "host", "P(fits)"} <= {
        *head.split()
    }
    assert [line.split()[0] for line in found[1:13]] == [str(number) for number in range(1, 13)]
    assert not any("…" in line for line in lines)
    reserve = "137.90 GiB of device memory (of the device's 140.40 GiB, 2.50 GiB are for driver and "
    assert reserve in " ".join(" ".join(lines).split())
    lines = shown(breakdown(result))
    assert not any("…" in line for line in lines)
    assert sum("gathered gradients" in line for line in lines) == 1


def test_a_step_of_hours_stays_in_its_lines() -> None:
    """From 10,000 s on steps and their intervals are in hours, in `search`, `compare` and its sweep."""
    batch, machine = 12 * 1200, load_profile("h200-sxm-141g")
    job = TrainSpec(seq_len=2**20, global_batch=batch)
    result = simulate(load_model("mop_1t"), machine, 12, mop(96, context_parallel=8, expert_parallel=32), job)
    assert result.step_time > 1e6
    sweep = Sweep("seq-len", [SweepPoint(2**20, "1M", {"mop": result}, batch=batch)])
    for lines, place in ((shown(comparison([result], "a job")), 1), (shown(swept_table(sweep)), 3)):
        first = rows(lines)[1].split()
        step, unit, interval = first[place : place + 3]
        low, high = (int(end.replace(",", "")) for end in interval.split("-"))
        assert (unit, low < int(step) < high) == ("h", True)
        assert int(step) == round(result.step_time / 3600)


def test_a_plan_of_several_points_is_written_once() -> None:
    job = TrainSpec(seq_len=4096, global_batch=8)
    one = simulate(load_model("mop_120b"), load_profile("h200-sxm-141g"), 1, mop(8, expert_parallel=8), job)
    points = [SweepPoint(at, str(at), {"mop": one, "none": None}, {"none": "no"}) for at in (1, 2, 4)]
    said = " ".join(" ".join(shown(swept_table(Sweep("nodes", points)))).split())
    assert said.count(one.line) == 1
    assert f"1, 2, 4 mop: {one.line}" in said
    assert said.endswith("1 none, 2 none, 4 none: no")


def test_a_sizing_stays_in_its_lines() -> None:
    machines = [load_profile(name) for name in ("a100-pcie-80g", "gb300-288g")]
    goal = Goal(10**11, 365 * DAY)
    request = Request(load_model("tiny"), goal, 4096, 2**20, ("mop",), max_nodes=2, simulations=1)
    sizings = [size_all(request, [machine])[0] for machine in machines]
    found = rows(shown(sizing_table(Decided(request, sizings))))
    for line, machine in zip(found[1:], machines, strict=False):
        assert line.startswith(machine.name)


def test_a_context_sweep_stays_in_its_lines() -> None:
    """All contenders over the nine lengths of the command, with the widest numbers, marks and stops."""
    machine, lengths = load_profile("h200-sxm-141g"), [65536 << place for place in range(9)]
    case, names = ContextCase(load_model("mop_120b"), machine, 2, 2**17), contenders()
    result = simulate(
        load_model("tiny"), machine, 1, mop(8, expert_parallel=8), TrainSpec(seq_len=512, global_batch=8)
    )
    fits = replace(result, tokens_per_second_per_device=12345.6, fits=True)
    out = replace(result, fits=False, over="activations")
    curves = {
        one.name: Curve(
            one,
            [
                ContextPoint(length, 1, fits if place < 8 else out, small=place > 5, gap=0.1)
                for place, length in enumerate(lengths)
            ],
        )
        for one in names
    }
    lines = shown(shown_table(case, curves, lengths))
    found = rows(lines)
    assert found[0].split() == ["#", *["64K", "128K", "256K", "512K", "1M", "2M", "4M", "8M", "16M"]]
    labels = [*map(str, range(1, 8))] + [name for number in range(2, 8) for name in (f"1/{number}", "P")]
    assert [line.split()[0] for line in found[1:20]] == labels
    assert found[9].split() == ["P", *["0.50"] * 6]
    said = " ".join(" ".join(lines).split())
    assert "P: the probability that 1 is the faster one in a run; with 90% a measured ratio is 0." in said
    assert all(len(line.split()) == 10 for line in found[1:8])
    assert lines[0].startswith("120B on 16 devices of h200-sxm-141g, tokens/s per GPU")
    stops = "8M†, stopped at 16M by activations; gap 10 %"
    assert f"2 {names[1].label}: {stops}; on {names[1].runs_on}" in said
    narrow = {name: replace(one, points=one.points[:1]) for name, one in curves.items()}
    assert (
        shown(shown_table(case, narrow, lengths[:1]))[0]
        .rstrip()
        .endswith(", tokens/s per GPU; 131,072 tokens per GPU")
    )


@pytest.mark.parametrize(("seconds", "text"), [(5e-36, "0"), (-5e-36, "0"), (0.0, "0"), (2e-7, "0.2 us")])
def test_a_rounding_error_is_no_time(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
