"""The figures of this report, written into its README between two marks."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from mopsim.common import io
from mopsim.intervals.errors import NAMES, Name
from mopsim.report.validation_tables import Grid
from mopsim.validate.components import Predicted
from mopsim.validate.output import GROUPS, MEASURES, UNITS, component_errors, selections, worst
from mopsim.validate.run import Validation
from mopsim.validate.scored import Scored
from mopsim.validate.scoring import ErrorSummary, by_group, capacity, errors, over_sources, regrets
from mopsim.validate.uncertain import coverage
from reports.validation import regression

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- figures: made by make.py -->", "<!-- end of figures -->"
JUDGED, EIGHT_BITS, GOOD = "bf16_fp16_AB", "fp8_mxfp8_A", "AB"
LEVEL = 0.9
FEW = 5
"""Runs from which a source is named."""
FEW_HELD = 0.85
"""Share of held intervals below which a source is named: an average over sources hides it."""


def install(validation: Validation, unknown: Sequence[Scored], parts: Sequence[Predicted], few: Grid) -> None:
    """Replace what stands between the marks. unknown: runs by stacks that are none of theirs."""
    text = io.read_text(README)
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    grids = [
        _asked(validation, parts), few, *(_by_machine(validation, name) for name in NAMES),
        _by_source(validation), _guessed(unknown), _largest(validation),
    ]  # fmt: skip
    body = "\n".join(grid.markdown() for grid in grids)
    io.write_text(README, f"{head}{BEGIN}\n\n{body}\n{END}{tail}")


def _asked(validation: Validation, parts: Sequence[Predicted]) -> Grid:
    source, model = (selections(validation.held[name]) for name in ("source", "model"))
    table = Grid("against the figures asked for", ("what", "asked", "reached"), ())
    for name, rows in (("the whole source left out", source), ("the network left out", model)):
        for words, chosen in (("bf16 and fp16, A+B", JUDGED), ("fp8 and mxfp8, A", EIGHT_BITS)):
            asked = "12 %, bias 4 %" if rows is source else "8 %, bias 3 %" if chosen == JUDGED else "12 %"
            table.add_row(f"step time, {words}, {name}", asked, _said(rows[chosen], "step_time_s"))
    named = by_group(source[JUDGED], MEASURES["step_time_s"], GROUPS["source"])
    each = ", ".join(f"{name} {one.mape:.1%}" for name, one in sorted(named.items()) if one.n >= FEW)
    table.add_row(f"every source with {FEW} rows or more, left out", "12 %", each)
    table.add_row("peak memory, A+B", "5 %", _said(source[GOOD], "peak_memory_bytes"))
    for name in NAMES:
        what = f"{LEVEL:.0%} intervals of {name.replace('_', ' ')} that hold"
        table.add_row(what, "85-95 %", _held(validation, name))
    fits = capacity(validation.scored)
    table.add_row("runs that ran, P(fits) above 0.5", "99 %", _of(fits.ran_right, fits.ran))
    table.add_row("runs that ran out, predicted to", "all", _of(fits.ran_out_right, fits.ran_out))
    if parts:
        table.add_row("components: time, memory", "10 %, 5 %", _components(parts))
    jobs = {name: regrets(validation.held[name]) for name in ("source", "model")}
    alone, held = (fmean(one.slowdown for one in some) for some in jobs.values())
    count = len(jobs["source"])
    table.add_row("regret", "3 %", f"{alone:.1%} over {count} jobs; {held:.1%} with the network left out")
    return table


def _said(rows: Sequence[Scored], measure: str) -> str:
    found = over_sources(rows, MEASURES[measure])
    if not found:
        return "none"
    return f"{found.mape:.1%}, bias {found.bias:+.1%}; 9 of 10 within {found.p90_ape:.1%}"


def _held(validation: Validation, name: Name) -> str:
    found = coverage(validation.held["source"], name, LEVEL)
    if found is None:
        return "none"
    shares = {source: found.share_of(source) for source in sorted(found.by_source)}
    few = ", ".join(f"{source} {share:.0%}" for source, share in shares.items() if share < FEW_HELD)
    return (
        f"{found.share:.1%} of {found.runs} runs of left-out sources ({found.share_of_sources:.1%} with the "
        f"sources weighing alike{'; below 85 %: ' + few if few else ''}); "
        f"median width {found.width:.0%} of the prediction"
    )


def _of(some: int, every: int) -> str:
    return f"{some} of {every} ({some / every:.1%})" if every else "none"


def _components(parts: Sequence[Predicted]) -> str:
    found = component_errors(list(parts))
    times = {k: m["latency_s"]["mape"] for k, m in found.items() if "mape" in m.get("latency_s", {})}
    peaks = {
        k: m["peak_memory_gib"]["mape"] for k, m in found.items() if "mape" in m.get("peak_memory_gib", {})
    }
    said = ("; ".join(f"{kind.replace('_', ' ')} {one:.1%}" for kind, one in some.items())
            for some in (times, peaks))  # fmt: skip
    return "time: {}; memory: {}".format(*said)


def _by_machine(validation: Validation, name: Name) -> Grid:
    """What a buyer asks: how far off on this card, for what runs on it."""
    rows = selections(validation.held["source"])[GOOD]
    found = {key: one for key, one in _groups(rows).items() if over_sources(one, MEASURES[UNITS[name]])}
    kinds = sorted({kind for _, kind in found})
    words = name.replace("_", " ")
    title = f"{words} by machine and what runs on it, A and B, source left out: error (runs of sources)"
    table = Grid(title, ("machine",), tuple(kinds))
    for machine in sorted({machine for machine, _ in found}):
        table.add_row(machine, *(_cell(found.get((machine, kind), ()), name) for kind in kinds))
    return table


def _groups(rows: Sequence[Scored]) -> dict[tuple[str, str], list[Scored]]:
    """By the card, as its profiles' names begin, and network and program."""
    found: dict[tuple[str, str], list[Scored]] = defaultdict(list)
    for one in rows:
        what = "experts" if one.case.network().num_local_experts else "dense"
        found[one.case.hardware.split("-")[0], f"{what}, {one.case.strategy.name}"].append(one)
    return found


def _cell(some: Sequence[Scored], name: Name) -> str:
    found = over_sources(some, MEASURES[UNITS[name]])
    if found is None:
        return ""
    sources = by_group(some, MEASURES[UNITS[name]], GROUPS["source"])
    return f"{found.mape:.0%} ({found.n} of {len(sources)})"


def _by_source(validation: Validation) -> Grid:
    """The runs that the figures are stated for, beside what six coefficients make of them."""
    columns = ("runs", "source out", "bias", "network out", "bias", "regression")
    table = Grid("bf16 and fp16, A and B, by source", ("source",), columns)
    held = {name: selections(rows)[JUDGED] for name, rows in validation.held.items()}
    found = {name: by_group(rows, MEASURES["step_time_s"], GROUPS["source"]) for name, rows in held.items()}
    lines = regression.of_scored(validation.scored)
    for source, one in sorted(found["source"].items()):
        line = errors(lines.get(row.case.id) for row in held["source"] if row.case.source.name == source)
        cells = [text for other in (one, found["model"][source]) for text in _cells(other)]
        table.add_row(source, str(one.n), *cells, f"{line.mape:.1%}" if line else "none")
    return table


def _guessed(unknown: Sequence[Scored]) -> Grid:
    """What programs are off by that nobody described."""
    columns = ("runs", "error", "bias", "90% held", "width", "peaks", "error", "bias", "held", "width")
    table = Grid("runs by the general stack of their family, source left out", ("source",), columns)
    groups = GROUPS["source"]
    for source in (*sorted({groups(one) for one in unknown}), ""):
        some = [one for one in unknown if not source or groups(one) == source]
        cells = [text for name in NAMES for text in _guessed_cells(some, name)]
        table.add_row(source or "sources weighing alike", *cells)
    return table


def _guessed_cells(some: Sequence[Scored], name: Name) -> tuple[str, ...]:
    found, held = over_sources(some, MEASURES[UNITS[name]]), coverage(some, name, LEVEL)
    if found is None or held is None:
        return ("",) * 5
    return str(found.n), *_cells(found), f"{held.share_of_sources:.0%}", f"{held.width:.0%}"


def _cells(one: ErrorSummary) -> tuple[str, str]:
    return f"{one.mape:.1%}", f"{one.bias:+.1%}"


def _largest(validation: Validation) -> Grid:
    columns = ("measured s", "predicted s", f"{LEVEL:.0%}", "error")
    table = Grid("the ten largest errors of these runs, source left out", ("run",), columns)
    for one in worst(selections(validation.held["source"])[JUDGED], 10):
        ends = " to ".join(f"{end:.3g}" for end in one.interval("step_time", LEVEL))
        measured = one.case.measured.step_time or 0.0
        cells = (f"{measured:.3g}", f"{one.calibrated:.3g}", ends, f"{one.step_error or 0.0:+.0%}")
        table.add_row(one.case.id, *cells)
    return table
