"""The report of the closed loop: who won, whether the loss fell, and how far predictions were off before
and after calibration."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import quantiles
from typing import Any

from msgspec.structs import replace

import mopsim
from mopsim.engine import SimResult
from mopsim.report.compare import memory_figure, time_figure, timeline_title
from mopsim.report.page import Page, Section, Table, write_page
from mopsim.report.plots import Compared, loss_lines, predicted_bars
from mopsim.report.tables import describe
from mopsim.report.timeline import timeline_plot
from mopsim.spec import io
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.plan import Measurement, Plan
from mopsim.spec.units import format_bytes, format_seconds

BUSY = 1.4
"""p90 of a run's steps over p10 from which its machine is called busy: 1.05 to 1.1 when nothing else runs."""


@dataclass
class Contender:
    """One strategy of the loop: its plan, what was measured, what is predicted.

    as_planned: the short run whose tokens were routed as the plan assumes. probed, piloted, calibrated: by
    the profile as probed, as calibrated from the pilot runs, and as calibrated from the first two strategies'
    runs as well, routed as the first strategy's router did. even, worst: by the probed profile, routed as the
    plan assumes, and every token of an expert-parallel group routed to one rank.
    """

    name: str
    plan: Plan
    measured: Measurement
    as_planned: Measurement
    losses: list[float]
    probed: SimResult = field(init=False)
    piloted: SimResult = field(init=False)
    calibrated: SimResult = field(init=False)
    even: SimResult = field(init=False)
    worst: SimResult = field(init=False)

    def spread(self) -> tuple[float, float]:
        """p10 and p90 of the measured step times."""
        return _spread(self.measured)

    def fall(self) -> float:
        """By how much of its first value the loss fell, its last being the mean of the last five steps
        (they are noisy)."""
        tail = self.losses[-5:]
        return 1 - sum(tail) / len(tail) / self.losses[0]

    def error(self, result: SimResult) -> float:
        """Predicted step time against the measured median, relative."""
        return result.step_time / self.measured.step_time_median - 1

    def memory_error(self) -> float:
        """Predicted device peak against the tracked one, tokens routed as the plan assumes; relative."""
        return self.even.peak_memory / self.as_planned.peak_memory - 1

    def worst_memory(self) -> float:
        """Predicted device peak under the worst routing against the tracked one of the real router."""
        return self.worst.peak_memory / self.measured.peak_memory - 1


def _spread(run: Measurement) -> tuple[float, float]:
    """p10 and p90 of the step times, s."""
    times = list(run.step_times)
    if len(times) < 2:
        return times[0], times[0]
    deciles = quantiles(times, n=10, method="inclusive")
    return deciles[0], deciles[-1]


@dataclass
class DemoReport:
    """contenders: the best MoP, the best FSDP2, and the held-out strategy last. probed, piloted, calibrated:
    the profiles."""

    contenders: list[Contender]
    pilots: list[Measurement]
    probed: HardwareProfile
    piloted: HardwareProfile
    calibrated: HardwareProfile
    seed: int
    steps: int
    commands: list[str]
    searches: dict[str, dict[str, Any]]
    command: str
    replicated: SimResult
    tracked_steps: int

    def limit(self) -> str:
        """The device's memory, and what the plain plan would need."""
        need = format_bytes(self.replicated.peak_memory)
        limit = format_bytes(self.probed.memory_limit())
        fits = "fits" if self.replicated.fits else "does not fit"
        return (
            f"A rank's device has {limit} here, enforced: a small device so that memory decides. "
            f"The plain plan, model and optimizer whole on every rank, would need {need} and {fits}. "
            "The limit is enforced, byte by byte, while the run is built and in its first "
            f"{self.tracked_steps} steps, which are not timed: no timed step carries the tracker."
        )

    def verdict(self) -> str:
        """Who won, whichever it is."""
        first, second = sorted(self.contenders[:2], key=lambda one: one.measured.step_time_median)
        fast, slow = first.measured.step_time_median, second.measured.step_time_median
        apart = "" if _apart(first, second) else " (their spreads overlap: a tie on this machine)"
        return (
            f"Winner: {first.name}, {format_seconds(fast)} a step "
            f"against {format_seconds(slow)} of {second.name}, "
            f"{slow / fast:.2f}x as fast{apart}"
        )

    def busy(self) -> list[str]:
        """The runs whose steps scatter so much that something else was running: their times tell little."""
        runs = {one.name: one.measured for one in self.contenders}
        runs |= {one.plan.strategy.name: one for one in self.pilots}
        return [name for name, run in runs.items() if _spread(run)[1] > BUSY * _spread(run)[0]]

    def warning(self) -> str:
        """A line where the machine was not quiet, else ''."""
        runs = self.busy()
        if not runs:
            return ""
        return (
            f"The machine was not quiet: the steps of {', '.join(runs)} scatter by more than {BUSY - 1:.0%} "
            "(p10 to p90). Neither these times nor what was calibrated from them are to be trusted. "
        )

    def piloted_alike(self, one: Contender) -> bool:
        """Whether the search chose what a pilot run had: it is then no prediction of an unseen strategy."""
        pilots = [replace(run.plan.strategy, name=one.name) for run in self.pilots]
        return replace(one.plan.strategy, name=one.name) in pilots

    def orders(self) -> list[tuple[str, str, str, str]]:
        """Every pair: who is faster as measured, as predicted by the probed profile and by that of the pilot
        runs, which have seen neither, and whether the last agrees (or is a tie)."""
        found = []
        for a, b in combinations(self.contenders, 2):
            measured = min(a, b, key=lambda one: one.measured.step_time_median)
            other = b if measured is a else a
            first = min(a, b, key=lambda one: one.probed.step_time)
            predicted = min(a, b, key=lambda one: one.piloted.step_time)
            verdict = "agrees" if measured is predicted else "disagrees"
            if not _apart(a, b):
                verdict = "too close to tell: the spreads overlap"
            found.append(
                (
                    f"{measured.name} before {other.name}",
                    f"{first.name} first ({_ratio(a.probed, b.probed)})",
                    f"{predicted.name} first ({_ratio(a.piloted, b.piloted)})",
                    verdict,
                )
            )
        return found


def _ratio(a: SimResult, b: SimResult) -> str:
    """By which factor the slower one is slower."""
    low, high = sorted((a.step_time, b.step_time))
    return f"{high / low:.2f}x"


def _apart(a: Contender, b: Contender) -> bool:
    """Whether two medians differ by more than the wider half spread (p10 to p90)."""
    gap = abs(a.measured.step_time_median - b.measured.step_time_median)
    return gap > max(high - low for low, high in (a.spread(), b.spread())) / 2


def write_demo(folder: Path, report: DemoReport) -> list[Path]:
    """index.md, index.html and PNGs; returns what was written, the pages last."""
    contenders = report.contenders
    results, labels = [one.calibrated for one in contenders], [one.name for one in contenders]
    held = contenders[-1]
    shown = [one.calibrated if one is held else one.piloted for one in contenders]
    off = [abs(one.error(result)) for one, result in zip(contenders, shown, strict=True)]
    before = [abs(one.error(one.probed)) for one in contenders]
    written = [
        memory_figure(folder / "memory.png", [one.even for one in contenders], labels),
        time_figure(folder / "time.png", results, labels),
        loss_lines(
            folder / "loss.png", {one.name: one.losses for one in contenders}, _loss_title(contenders)
        ),
        predicted_bars(
            folder / "predicted.png",
            [
                Compared(
                    one.name,
                    one.measured.step_time_median,
                    *one.spread(),
                    one.probed.step_time,
                    result.step_time,
                )
                for one, result in zip(contenders, shown, strict=True)
            ],
            f"Strategies that no calibration had seen: at most {max(off):.0%} off, {max(before):.0%} before",
        ),
    ]
    for one, result in zip(contenders, results, strict=True):
        target = folder / f"timeline-{one.name}.png"
        title = timeline_title(result, one.name)
        written.append(timeline_plot(target, result.spans, result.memory_curve, None, title))
    finding = f"{report.warning()}{report.verdict()}."
    page = Page("The loop, closed on this machine", finding, _sections(report), _facts(report))
    return written + write_page(folder, page)


def _loss_title(contenders: Sequence[Contender]) -> str:
    falls = [one.fall() for one in contenders[:2]]
    apart = difference(contenders[0].losses, contenders[1].losses, 10)
    both = f"{contenders[0].name} and {contenders[1].name}"
    return f"{both}: loss falls by {min(falls):.0%}, and differs by {apart:.0e} in 10 steps"


def difference(one: Sequence[float], other: Sequence[float], steps: int) -> float:
    """Largest relative difference of two loss curves within the first `steps`."""
    return max(abs(a - b) / abs(b) for a, b in zip(one[:steps], other[:steps], strict=False))


def _sections(report: DemoReport) -> list[Section]:
    contenders = report.contenders
    apart = difference(contenders[0].losses, contenders[1].losses, 10)
    return [
        Section(
            "Measured",
            "The best MoP and the best FSDP2 plan that the search found for this machine, "
            "and a third that calibration has not seen, "
            f"each trained on the same text with the same seed: "
            f"{report.steps} steps, the third for half of them. {report.limit()}",
            _measured(contenders),
        ),
        Section(
            "Predicted against measured",
            "The profile is calibrated first from two short pilot runs, one of each runtime, that no search "
            f"chose ({' and '.join(describe(run.plan.strategy) for run in report.pilots)}, evenly routed): "
            "what it says of the three strategies is predicted, and the search used it. Then it is "
            f"calibrated from the runs of {contenders[0].name} and {contenders[1].name} too; "
            f"{contenders[-1].name} is held out from both. A young router is uneven: all are predicted with "
            f"the routing that {contenders[0].name}'s run measured ({contenders[0].measured.routing}: "
            f"percent of a layer's routes on the experts of the busier rank / those experts)."
            + _alike(report),
            _predicted(contenders),
            ("predicted.png", "step time predicted before and after calibration, and measured"),
        ),
        Section(
            "Order by step time",
            table=Table(
                ("measured", "predicted before calibration", "predicted after the pilot runs", "verdict"),
                report.orders(),
            ),
        ),
        Section(
            "Loss",
            "Same data, same seed: the first two curves differ by at most "
            f"{apart:.1e} (relative) in the first 10 steps (asked: 1e-4 in float32: "
            f"{'met' if apart <= 1e-4 else 'NOT met'}). From the first step to the mean of the last five "
            f"the losses fall by {' and '.join(f'{one.fall():.0%}' for one in contenders[:2])} "
            f"(asked: 20 %: {'met' if min(one.fall() for one in contenders[:2]) >= 0.2 else 'NOT met'}).",
            picture=("loss.png", "training loss per step"),
        ),
        Section(
            "Memory by category",
            _memory_text(contenders),
            _memory(contenders),
            ("memory.png", "predicted device memory at the peak"),
        ),
        Section(
            "Step time by component",
            picture=("time.png", "simulated step time by component, calibrated profile"),
        ),
        *(
            Section(
                f"Timeline of {one.name}",
                describe(one.plan.strategy),
                picture=(f"timeline-{one.name}.png", f"simulated step of {one.name}"),
            )
            for one in contenders
        ),
        Section("The search", table=_searches(report)),
        Section("Calibration", table=_corrections(report)),
    ]


def result_table(report: DemoReport) -> Any:
    """The result for the terminal: measured and predicted step time, memory, loss."""
    from mopsim.report.terminal import table as terminal

    names = ("step", "probed", "piloted", "all runs", "memory", "loss")
    table = terminal("measured step, and how far off its predictions are", ("strategy",), names)
    for one in report.contenders:
        table.add_row(
            one.name,
            format_seconds(one.measured.step_time_median),
            f"{one.error(one.probed):+.0%}",
            f"{one.error(one.piloted):+.0%}",
            "fitted" if one is not report.contenders[-1] else f"{one.error(one.calibrated):+.0%}",
            format_bytes(one.measured.peak_memory),
            f"{-one.fall():+.0%}",
        )
    return table


def _measured(contenders: Sequence[Contender]) -> Table:
    rows = []
    for one in contenders:
        low, high = one.spread()
        m = one.measured
        rows.append(
            [
                describe(one.plan.strategy),
                f"{format_seconds(m.step_time_median)} ({format_seconds(low)} to {format_seconds(high)})",
                f"{m.tokens_per_second:,.0f}",
                format_bytes(m.peak_memory),
                format_bytes(m.host_memory),
                f"{one.losses[0]:.3f} to {one.losses[0] * (1 - one.fall()):.3f} ({-one.fall():+.0%})",
            ]
        )
    return Table(
        (
            "strategy",
            "step, median (p10 to p90)",
            "tokens/s",
            "device memory",
            "host memory",
            "loss, first to mean of last 5",
        ),
        rows,
    )


def _predicted(contenders: Sequence[Contender]) -> Table:
    rows = []
    for one in contenders:
        low, high = one.spread()
        predicted = [
            f"{format_seconds(result.step_time)} ({one.error(result):+.0%})"
            for result in (one.probed, one.piloted, one.calibrated)
        ]
        predicted[-1] += "" if one is contenders[-1] else ", fitted"
        measured = f"{format_seconds(one.measured.step_time_median)}"
        rows.append([one.name, f"{measured} ({format_seconds(low)} to {format_seconds(high)})", *predicted])
    names = (
        "strategy",
        "measured (p10 to p90)",
        "predicted before calibration",
        "after the pilot runs",
        "after the first two's runs",
    )
    return Table(names, rows)


def _alike(report: DemoReport) -> str:
    """A sentence where the search chose a pilot's own strategy, else ''."""
    alike = [one.name for one in report.contenders if report.piloted_alike(one)]
    return f" {' and '.join(alike)} is what a pilot run had: seen, not predicted." if alike else ""


def _memory_text(contenders: Sequence[Contender]) -> str:
    even = max(abs(one.memory_error()) for one in contenders)
    over = [one.worst_memory() for one in contenders]
    return (
        f"Predicted from shapes alone, before any run: within {even:.1%} of the tracked peaks where tokens "
        "are routed evenly, as the plan assumes (asked: 5 %). A young router is uneven, so plans are chosen "
        "to fit even if it sends every token to one rank; what that would take is predicted too, and is "
        f"{min(over):+.1%} to {max(over):+.1%} against the peak with the router as it learned. "
        "In the picture: the prediction for even routing."
    )


def _memory(contenders: Sequence[Contender]) -> Table:
    rows = [
        [
            one.name,
            format_bytes(one.as_planned.peak_memory),
            f"{format_bytes(one.even.peak_memory)} ({one.memory_error():+.1%})",
            format_bytes(one.measured.peak_memory),
            f"{format_bytes(one.worst.peak_memory)} ({one.worst_memory():+.1%})",
            format_bytes(one.measured.host_memory),
            format_bytes(one.even.host_memory),
        ]
        for one in contenders
    ]
    return Table(
        (
            "strategy",
            "device, tracked, even routing",
            "device, predicted, even routing",
            "device, tracked, learned routing",
            "device, predicted, worst routing",
            "host, tracked",
            "host, predicted",
        ),
        rows,
    )


def _searches(report: DemoReport) -> Table:
    rows = [
        [
            family,
            f"{found['candidates']:,}",
            f"{found['bounded']:,}",
            str(found["simulated"]),
            f"{found['seconds']:.1f} s",
        ]
        for family, found in report.searches.items()
    ]
    return Table(("family", "candidates", "bounded", "simulated", "time"), rows)


def _corrections(report: DemoReport) -> Table:
    rows = []
    for kind, correction in report.calibrated.corrections.items():
        rows.append(
            [
                kind,
                f"{correction.scale:.3g}",
                format_seconds(correction.overhead) if correction.overhead else "0",
                correction.source,
            ]
        )
    return Table(("kind of work", "scale", "overhead per op", "from"), rows)


def _facts(report: DemoReport) -> dict[str, str]:
    environment = report.contenders[0].measured.environment
    facts = {
        "command": report.command,
        "machine": ", ".join(f"{name} {value}" for name, value in environment.items() if value),
        "probed profile": f"{report.probed.name} (digest {io.digest(report.probed)})",
        "profile after the pilot runs": f"{report.piloted.name} (digest {io.digest(report.piloted)})",
        "profile after all runs": f"{report.calibrated.name} (digest {io.digest(report.calibrated)})",
        "version": mopsim.__version__,
        "seed": str(report.seed),
    }
    return facts | {f"step {index}": command for index, command in enumerate(report.commands, 1)}
