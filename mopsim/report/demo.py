"""The report of the closed loop: who won, whether the loss fell, and how far predictions were off before
and after calibration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mopsim
from mopsim.common import io
from mopsim.common.units import format_bytes, format_seconds
from mopsim.engine import SimResult
from mopsim.report.compare import memory_figure, time_figure
from mopsim.report.demo_results import DemoContender, DemoReport
from mopsim.report.page import Page, Section, Table, templates, write_page
from mopsim.report.plots import Compared, loss_lines, predicted_bars
from mopsim.report.terminal import table
from mopsim.report.timeline import timeline_plot


def write_demo(folder: Path, report: DemoReport) -> None:
    """index.md, index.html and PNGs."""
    contenders = report.contenders
    off = [abs(one.error(one.piloted)) for one in contenders]
    before = [abs(one.error(one.probed)) for one in contenders]
    memory_figure(folder / "memory.png", {one.name: one.even for one in contenders})
    parts = {one.name: one.calibrated for one in contenders}
    time_figure(folder / "time.png", parts, title="Simulated step by component")
    losses = {one.name: one.losses for one in contenders}
    loss_lines(folder / "loss.png", losses, _loss_title(contenders))
    predicted_bars(
        folder / "predicted.png",
        [
            Compared(
                one.name,
                one.measured.step_time_median,
                *one.spread(),
                one.probed.step_time,
                one.piloted.step_time,
            )
            for one in contenders
        ],
        f"Predicted from pilot runs of other plans: at most {max(off):.0%} off, {max(before):.0%} before"
        f"{_caveat(report)}",
    )
    for one in contenders:
        timeline_plot(folder / f"timeline-{one.name}.png", one.calibrated, one.name)
    finding = f"{report.warning()}{report.verdict()}."
    write_page(folder, Page("The loop, closed on this machine", finding, _sections(report), _facts(report)))


def _loss_title(contenders: Sequence[DemoContender]) -> str:
    falls = [one.fall() for one in contenders[:2]]
    apart = difference(contenders[0].losses, contenders[1].losses, 10)
    both = f"{contenders[0].name} and {contenders[1].name}"
    return f"{both}: loss falls by {min(falls):.0%}, and differs by {apart:.0e} in 10 steps"


def difference(one: Sequence[float], other: Sequence[float], steps: int) -> float:
    """Largest relative difference of two loss curves within the first `steps`."""
    return max(abs(a - b) / abs(b) for a, b in zip(one[:steps], other[:steps], strict=False))


def _texts(report: DemoReport) -> dict[str, str]:
    """What the sections say, by block of templates/demo.j2."""
    contenders = report.contenders
    over = [one.worst_memory() for one in contenders]
    template = templates().get_template("demo.j2")
    facts = template.new_context(
        {
            "steps": report.steps, "tracked_steps": report.tracked_steps,
            "limit": format_bytes(report.probed.memory_limit()),
            "disturbed": _disturbed(contenders), "others": report.beside(),
            "plain_need": format_bytes(report.replicated.peak_memory), "plain_fits": report.replicated.fits,
            "pilots": [run.plan.line for run in report.pilots],
            "first": contenders[0].name, "second": contenders[1].name, "held_out": contenders[-1].name,
            "routing": contenders[0].measured.routing,
            "seen": [one.name for one in contenders if report.piloted_alike(one)],
            "apart": difference(contenders[0].losses, contenders[1].losses, 10),
            "falls": [one.fall() for one in contenders[:2]],
            "even": max(abs(one.memory_error()) for one in contenders),
            "least": min(over), "most": max(over),
        }
    )  # fmt: skip
    return {name: "".join(block(facts)).strip() for name, block in template.blocks.items()}


def _caveat(report: DemoReport) -> str:
    """A second line of the title, where other programs ran beside; else ''."""
    if report.warning():
        return "\nThe machine was not quiet: neither measured nor calibrated times can be trusted"
    left = ", ".join(_disturbed(report.contenders))
    return f"\nOther programs were running: {left} left out" if left else ""


def _disturbed(contenders: Sequence[DemoContender]) -> list[str]:
    """'22 steps of mop', of each run that other programs disturbed."""
    counts = {one.name: one.measured.disturbed for one in contenders if one.measured.disturbed}
    return [f"{count} {'step' if count == 1 else 'steps'} of {name}" for name, count in counts.items()]


def _sections(report: DemoReport) -> list[Section]:
    contenders, texts = report.contenders, _texts(report)
    compared = (
        "predicted.png",
        "step time measured, and predicted before calibration and after the pilot runs",
    )
    orders = ("measured", "predicted before calibration", "predicted after the pilot runs", "verdict")
    peak = ("memory.png", "predicted device memory at the peak")
    parts = ("time.png", "simulated step time by component, calibrated profile")
    return [
        Section("Measured", texts["measured"], _measured(contenders)),
        Section("Predicted against measured", texts["predicted"], _predicted(contenders), compared),
        Section("Order by step time", table=Table(orders, report.orders())),
        Section("Loss", texts["loss"], picture=("loss.png", "training loss per step")),
        Section("Memory by category", texts["memory"], _memory(contenders), peak),
        Section("Step time by component", picture=parts),
        *(
            Section(
                f"Timeline of {one.name}",
                one.plan.line,
                picture=(f"timeline-{one.name}.png", f"simulated step of {one.name}"),
            )
            for one in contenders
        ),
        Section("The search", table=_searches(report)),
        Section("Calibration", table=_corrections(report)),
    ]


def result_table(report: DemoReport) -> Any:
    """The result for the terminal: measured and predicted step time, memory, loss."""
    names = ("step", "probed", "piloted", "all runs", "peak memory", "change of loss")
    shown = table("measured step, and how far off its predictions are", ("strategy",), names)
    for one in report.contenders:
        shown.add_row(
            one.name,
            format_seconds(one.measured.step_time_median),
            f"{one.error(one.probed):+.0%}",
            f"{one.error(one.piloted):+.0%}",
            "fitted" if one is not report.contenders[-1] else f"{one.error(one.calibrated):+.0%}",
            format_bytes(one.measured.peak_memory),
            f"{-one.fall():+.0%}",
        )
    return shown


def _between(one: DemoContender) -> str:
    """The measured step: median (p10 to p90)."""
    low, high = map(format_seconds, one.spread())
    return f"{format_seconds(one.measured.step_time_median)} ({low} to {high})"


def _beside(one: DemoContender, result: SimResult) -> str:
    """A predicted step, and how far it is off."""
    return f"{format_seconds(result.step_time)} ({one.error(result):+.0%})"


def _measured(contenders: Sequence[DemoContender]) -> Table:
    return Table.of(
        contenders,
        {
            "strategy": lambda one: one.plan.line,
            "step, median (p10 to p90)": _between,
            "tokens/s, all ranks": lambda one: f"{one.measured.tokens_per_second:,.0f}",
            "device memory": lambda one: format_bytes(one.measured.peak_memory),
            "host memory": lambda one: format_bytes(one.measured.host_memory),
            "loss, first to mean of last 5": lambda one: (
                f"{one.losses[0]:.3f} to {one.losses[0] * (1 - one.fall()):.3f} ({-one.fall():+.0%})"
            ),
        },
    )


def _predicted(contenders: Sequence[DemoContender]) -> Table:
    held_out = contenders[-1]
    return Table.of(
        contenders,
        {
            "strategy": lambda one: one.name,
            "measured (p10 to p90)": _between,
            "predicted before calibration": lambda one: _beside(one, one.probed),
            "after the pilot runs": lambda one: _beside(one, one.piloted),
            "after the first two's runs": lambda one: (
                _beside(one, one.calibrated) + ("" if one is held_out else ", fitted")
            ),
        },
    )


def _memory(contenders: Sequence[DemoContender]) -> Table:
    def off(predicted: SimResult, error: float) -> str:
        return f"{format_bytes(predicted.peak_memory)} ({error:+.1%})"

    return Table.of(
        contenders,
        {
            "strategy": lambda one: one.name,
            "device, tracked, even routing": lambda one: format_bytes(one.as_planned.peak_memory),
            "device, predicted, even routing": lambda one: off(one.even, one.memory_error()),
            "device, tracked, learned routing": lambda one: format_bytes(one.measured.peak_memory),
            "device, predicted, worst routing": lambda one: off(one.worst, one.worst_memory()),
            "host, tracked": lambda one: format_bytes(one.measured.host_memory),
            "host, predicted": lambda one: format_bytes(one.even.host_memory),
        },
    )


def _searches(report: DemoReport) -> Table:
    return Table.of(
        report.searches.items(),
        {
            "family": lambda one: one[0],
            "candidates": lambda one: f"{one[1]['candidates']:,}",
            "bounded": lambda one: f"{one[1]['bounded']:,}",
            "simulated": lambda one: str(one[1]["simulated"]),
            "time": lambda one: f"{one[1]['seconds']:.1f} s",
        },
    )


def _corrections(report: DemoReport) -> Table:
    return Table.of(
        report.calibrated.corrections.items(),
        {
            "kind of work": lambda one: one[0],
            "scale": lambda one: f"{one[1].scale:.3g}",
            "overhead per op": lambda one: format_seconds(one[1].overhead),
            "from": lambda one: one[1].source,
        },
    )


def _facts(report: DemoReport) -> dict[str, str]:
    environment = report.contenders[0].measured.environment
    facts = {
        "command": report.command,
        "machine": ", ".join(f"{name} {value}" for name, value in environment.items() if value),
        "probed profile": io.identified(report.probed),
        "profile after the pilot runs": io.identified(report.piloted),
        "profile after all runs": io.identified(report.calibrated),
        "version": mopsim.__version__,
        "seed": str(report.seed),
    }
    return facts | {f"step {index}": command for index, command in enumerate(report.commands, 1)}
