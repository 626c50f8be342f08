"""Strategies over the values of one setting: words, tables and a figure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap

from rich.console import Group
from rich.text import Text

from mopsim.common.units import format_probability
from mopsim.engine import SimResult
from mopsim.report.findings import odds, outcome
from mopsim.report.page import Table
from mopsim.report.plots import NO_MEMORY, NO_STRATEGY, sweep_lines
from mopsim.report.tables import beside, columns, plan_line, rate, row
from mopsim.report.terminal import duration, size, table

TITLE = 84
"""Characters of a line of a figure's title."""


@dataclass(frozen=True)
class Sweep:
    """Strategies over the values of one setting (names: as they were written), by label; None where there is
    no result.

    bands: tokens/s of a GPU at the ends of an interval, where there is one. refused: why there is no result.
    batches, lengths: sequences of a step, tokens of a sequence, at each value. hold: what is constant.
    """

    setting: str
    values: Sequence[int]
    names: Sequence[str]
    results: Mapping[str, Sequence[SimResult | None]]
    bands: Mapping[str, Sequence[tuple[float, float] | None]] = field(default_factory=dict)
    refused: Mapping[str, Sequence[str]] = field(default_factory=dict)
    batches: Sequence[int] = ()
    lengths: Sequence[int] = ()
    hold: str = ""

    @property
    def each(self) -> list[str]:
        """What the devices of the results are called."""
        return [one.each for points in self.results.values() for one in points if one]

    @property
    def held(self) -> str:
        """'held constant: tokens per step (1,048,576)', and where that is not exact."""
        if not self.hold:
            return ""
        tokens = [batch * length for batch, length in zip(self.batches, self.lengths, strict=True)]
        if self.hold != "tokens per step":
            return f"held constant: {self.hold}; tokens per step {min(tokens):,} to {max(tokens):,}"
        usual = max(set(tokens), key=tokens.count)
        other = [
            f"{name} has {count:,}" for name, count in zip(self.names, tokens, strict=True) if count != usual
        ]
        return "; ".join([f"held constant: tokens per step ({usual:,})", *other])


def over(sweep: Sweep) -> str:
    """'Over nodes: a is fastest at 1 (probability 0.53), 2 (probability 0.8); a and b tie at 4, 8'."""
    places: dict[str, list[str]] = {}
    for index, name in enumerate(sweep.names):
        sure = odds(*_at(sweep, index))
        places.setdefault(outcome_at(sweep, index), []).append(f"{name} ({sure})" if sure else name)
    found = [f"{said} at {', '.join(names)}" for said, names in places.items()]
    return f"Over {sweep.setting}: {'; '.join(found)}"


def outcome_at(sweep: Sweep, index: int) -> str:
    """Who is fastest at one value of the sweep."""
    return outcome(*_at(sweep, index))


def _at(sweep: Sweep, index: int) -> tuple[list[SimResult | None], list[str]]:
    """Results at one value, and their labels."""
    return [points[index] for points in sweep.results.values()], list(sweep.results)


def _title(sweep: Sweep) -> str:
    """How far the strategies go, and who is fastest at the last value that all reach."""
    unit = {"seq-len": "tokens"}.get(sweep.setting, sweep.setting)
    fit = {label: [bool(one and one.fits) for one in points] for label, points in sweep.results.items()}
    last = max((index for found in fit.values() for index, fits in enumerate(found) if fits), default=None)
    if last is None:
        legal = any(one for points in sweep.results.values() for one in points)
        return f"Nothing {'fits' if legal else 'is legal'} anywhere in the sweep"
    name, leaders = sweep.names[last], [label for label, found in fit.items() if found[last]]
    if len(leaders) < len(fit):
        return f"{', '.join(leaders)} reach{'es' * (len(leaders) == 1)} {name} {unit}"
    whole = [one for one, *fits in zip(sweep.names, *fit.values(), strict=True) if all(fits)]
    holes = len(whole) < last + 1
    sure = odds(*_at(sweep, last))
    first = f"; {outcome_at(sweep, last)} {f'at {name}' if holes else 'there'}" if len(fit) > 1 else ""
    where = f"at {', '.join(whole)}" if holes else f"up to {name}"
    return f"All fit {where} {unit}{first}{f' ({sure})' if sure else ''}"


def _lost(result: SimResult | None) -> str:
    """Why there is no throughput."""
    return NO_STRATEGY if result is None else "" if result.fits else NO_MEMORY


def sweep_figure(path: Path, sweep: Sweep, level: float = 0.9, where: str = "") -> Path:
    """Throughput over the setting, marks where there is none. level: of the bands. where: the network and the
    machine, for the title, which says too what is held constant."""
    series = {
        label: [r.tokens_per_second_per_device if r and r.fits else None for r in points]
        for label, points in sweep.results.items()
    }
    lost = {label: [_lost(one) for one in points] for label, points in sweep.results.items()}
    xlabel = {"seq-len": "sequence length, tokens"}.get(sweep.setting, sweep.setting)
    below = "; ".join(filter(None, (where, sweep.held)))
    title = "\n".join(filter(None, (*wrap(_title(sweep), TITLE), *wrap(below, TITLE))))
    per = rate(sweep.each)
    return sweep_lines(path, sweep.values, series, title, xlabel, per, sweep.names, lost, sweep.bands, level)


def swept_table(sweep: Sweep, level: float = 0.9) -> Group:
    """Every point on the terminal: its numbers, and under them its plan. level: of the intervals."""
    per = rate(sweep.each).replace(" per", "\nper")
    shown = table(
        f"over {sweep.setting}; {sweep.held}", (sweep.setting, "strategy"),
        ("batch", "step", f"{level:.0%}", per, "exposed", "memory", "P(fits)"),
    )  # fmt: skip
    shown.padding = 0  # seven numbers in 80 columns
    plans = []
    for index, name in enumerate(sweep.names):
        for label, points in sweep.results.items():
            result = points[index]
            batch = f"{sweep.batches[index]:,}" if sweep.batches else ""
            if result is None:
                shown.add_row(name, label, batch, *["-"] * 6, style="red")
                why = sweep.refused.get(label, [""] * (index + 1))[index]
                plans.append(Text(f"{name} {label}: {NO_STRATEGY}: {why}"))
                continue
            step = duration(result.step_time)
            shown.add_row(
                name, label, batch, step, beside(result.step_time_interval(level), step),
                f"{result.tokens_per_second_per_device:,.0f}", f"{result.exposed_share:.0%}",
                size(result.peak_memory), format_probability(result.p_fits) if result.fits else "out",
                style="" if result.fits else "red",
            )  # fmt: skip
            plans.append(Text(f"{name} {label}: {plan_line(result)}"))
    return Group(shown, *plans)


def swept_rows(sweep: Sweep, level: float = 0.9) -> Table:
    """A row for each value and strategy, its plan among them."""
    numbers = columns(level, sweep.each)
    heads = [sweep.setting, *(["batch"] if sweep.batches else []), "label", *numbers]
    rows = []
    for index, name in enumerate(sweep.names):
        head = [name, *(f"{batch:,}" for batch in sweep.batches[index : index + 1])]
        for label, points in sweep.results.items():
            result = points[index]
            if result is None:
                why = sweep.refused[label][index] if label in sweep.refused else ""
                cells = [f"{NO_STRATEGY}{': ' if why else ''}{why}", *[""] * (len(numbers) - 1)]
            else:
                cells = row(result, level)
            rows.append([*head, label, *cells])
    return Table(heads, rows)
