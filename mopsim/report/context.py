"""Context length against throughput, as a report: figures, tables, and sentences that follow from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mopsim.context.contenders import Contender
from mopsim.context.published import LARGEST_STEP, POINTS, PRINTED_END, SOURCE, Published
from mopsim.context.sweep import Case, Curve, Point
from mopsim.context.variants import Variant
from mopsim.report.page import Page, Section, Table, write_page
from mopsim.report.style import SERIES, figure, legend_below
from mopsim.report.tables import describe
from mopsim.spec.units import format_bytes

LINES = {
    "mop": ("#ca6f1e", "-", 3.0),
    "fsdp2": ("#1b4f72", "-", 2.5),
    "fsdp2_node_chunked": ("#2e86c1", "--", 1.8),
    "fsdp2_full": ("#117864", "-.", 1.8),
    "fsdp2_node": ("#922b21", "--", 1.8),
    "fsdp2_half_node": ("#7d6608", "--", 1.8),
    "fsdp2_device": ("#8e44ad", ":", 2.2),
}
"""Colour, line and width by contender."""


@dataclass(frozen=True)
class Study:
    """All that was found. curves: of each case, by contender. variants: of the first case, each with its
    curves."""

    cases: Sequence[Case]
    curves: Sequence[Mapping[str, Curve]]
    variants: Sequence[tuple[Variant, Mapping[str, Curve]]]
    lengths: Sequence[int]
    contenders: Sequence[Contender]


def short(tokens: int) -> str:
    """'128K', '1M'."""
    for unit, scale in (("M", 1 << 20), ("K", 1 << 10)):
        if tokens >= scale and tokens % scale == 0:
            return f"{tokens // scale}{unit}"
    return f"{tokens:,}"


def reach(curve: Curve) -> str:
    """The longest length that fits; at least that where the longest asked fits."""
    longest = curve.longest
    return f"{'' if curve.end else '>= '}{_length(longest)}" if longest else "none"


def _length(point: Point | None) -> str:
    """'256K', marked; 'none'."""
    return f"{short(point.seq_len)}{_marks(point)}" if point else "none"


def _marks(point: Point) -> str:
    """A star: at risk. A dagger: of the smallest step."""
    return ("*" if point.verdict == "at risk" else "") + ("\u2020" if point.small else "")


def cell(point: Point | None) -> str:
    """Tokens per second and device, or what stops it."""
    if point is None:
        return ""
    if point.throughput is None:
        return f"out: {point.stopped_by}" if point.result else "not legal"
    return f"{point.throughput:,.0f}{_marks(point)}"


def ratio(above: Curve, below: Curve, seq_len: int) -> float | None:
    """Throughput of one over the other's at a length, where both fit with the whole step."""
    one, other = above.at(seq_len), below.at(seq_len)
    if any(point and point.small for point in (one, other)):
        return None
    if one is None or other is None or not one.throughput or not other.throughput:
        return None
    return one.throughput / other.throughput


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def case_name(case: Case) -> str:
    size = case.model.name.removeprefix("mop_").upper()
    return f"{size} on {case.world_size} devices"


def finding(case: Case, curves: Mapping[str, Curve]) -> str:
    """Where each contender ends, and how MoP compares with the freest baseline while that runs."""
    ends = []
    for name, curve in reversed(list(curves.items())):
        if name != "mop":
            stop = f", stopped by {curve.end.stopped_by}" if curve.end else ""
            ends.append(f"{curve.contender.label} {reach(curve)}{stop}")
    low, high = _span([curves])
    speed = f"MoP is {low:.2f}x to {high:.2f}x as fast as the freest FSDP2 where both run"
    return f"Reach: {'; '.join(ends)}; MoP {reach(curves['mop'])}. {speed}."


def _span(all_curves: Sequence[Mapping[str, Curve]]) -> tuple[float, float]:
    """Least and most of MoP's throughput over unrestricted FSDP2's, where both run; (0, 0) if nowhere."""
    found = [
        value
        for curves in all_curves
        for point in curves["mop"].points
        if (value := ratio(curves["mop"], curves["fsdp2"], point.seq_len))
    ]
    return (min(found), max(found)) if found else (0.0, 0.0)


def _range(study: Study, name: str) -> str:
    """Where a contender ends over all cases: '256K to 1M'."""
    ends = [curves[name].longest for curves in study.curves if name in curves]
    lengths = sorted(point.seq_len if point else 0 for point in ends)
    names = [short(length) if length else "no length at all" for length in (lengths[0], lengths[-1])]
    return names[0] if names[0] == names[1] else f"{names[0]} to {names[1]}"


def as_printed(study: Study) -> str:
    """Under which rules FSDP2 ends where the sources say."""
    parts = []
    for case, curves in zip(study.cases, study.curves, strict=True):
        ends = {curve.contender.label.removeprefix("FSDP2, "): curve.longest for curve in curves.values()}
        near = [label for label, end in ends.items() if end and end.seq_len <= PRINTED_END]
        never = [label for label, end in ends.items() if end is None]
        parts.append(
            f"{case_name(case)}: {' or '.join(near) or 'none of these'}"
            + (f" (at no length: {', '.join(never)})" if never else "")
        )
    return (
        "The sources print that FSDP2's longest context is 128K at 120B, and that it runs out of memory "
        "beyond 64 to 128K at about 600B and 1T. Here the rules under which it ends at "
        f"{short(PRINTED_END)} or before are: {'; '.join(parts)}."
    )


def smaller(study: Study) -> str:
    """Who reaches further with one sequence for each group of ranks than with the whole step."""
    parts = []
    for case, curves in zip(study.cases, study.curves, strict=True):
        found = [
            f"{curve.contender.label} {reach(curve)} instead of {_length(curve.whole)}"
            for curve in curves.values()
            if _further(curve)
        ]
        parts += [f"{case_name(case)}: {', '.join(found)}"] if found else []
    if not parts:
        return "No contender reaches further with a smaller step."
    return (
        "A dagger: the whole step does not fit (from its second microbatch on accumulated gradients lie "
        "beside the activations); the smallest legal step does, one sequence for each group of ranks that "
        f"shares one, and the throughput is of that step. {'; '.join(parts)}."
    )


def _far(study: Study) -> str:
    """The least and the most that FSDP2 reaches where it runs at all."""
    ends = [curve.longest for curves in study.curves for name, curve in curves.items() if name != "mop"]
    lengths = sorted(point.seq_len for point in ends if point)
    return f"{short(lengths[0])} to {short(lengths[-1])}" if lengths else "none"


def summary(study: Study) -> str:
    """The whole in a few sentences."""
    low, high = _span(study.curves)
    parts = [
        f"MoP reaches {_range(study, 'mop')} tokens. FSDP2 with a chunked loss, any context parallelism and "
        f"CPU offload reaches {_range(study, 'fsdp2')}; where both run, MoP has {low:.2f}x to {high:.2f}x "
        "its throughput."
    ]
    for name, what in (
        ("fsdp2_full", "With all logits of a rank at once FSDP2 ends at {}"),
        ("fsdp2_node", "with a sequence that stays in a node besides, at {}"),
        ("fsdp2_half_node", "in half a node, at {}"),
        ("fsdp2_device", "with all logits and nothing on the host, at {}"),
    ):
        if all(name in curves for curves in study.curves):
            parts.append(what.format(_range(study, name)))
    ends = f" {'; '.join(parts[1:])}." if parts[1:] else ""
    small = [curve for curves in study.curves for curve in curves.values() if _further(curve)]
    names = list(dict.fromkeys(curve.contender.label for curve in small))
    steps = f" In some cases only the smallest legal step fits so far: {'; '.join(names)}." if names else ""
    return parts[0] + ends + steps


def _further(curve: Curve) -> bool:
    """Whether the longest length fits with the smallest step only."""
    return curve.longest is not None and curve.longest.small


def throughput_figure(path: Path, study: Study) -> Path:
    """A panel a network: tokens/s per device over context length, a cross where memory ends."""
    columns = min(2, len(study.cases))
    rows = -(-len(study.cases) // columns)
    with figure(path, 7.2 * columns, 4.6 * rows + 0.9, rows, columns, sharex=True) as axes:
        for axis, case, curves in zip(axes, study.cases, study.curves, strict=False):
            for name, curve in reversed(list(curves.items())):
                tint, line, width = LINES[name]
                good = [(p.seq_len, p.throughput) for p in curve.points if p.throughput]
                axis.plot(
                    [x for x, _ in good], [y for _, y in good], linestyle=line, linewidth=width, color=tint,
                    marker="o", markersize=3.5, label=curve.contender.label,
                )  # fmt: skip
                thin = [(p.seq_len, p.throughput) for p in curve.points if p.throughput and p.small]
                axis.plot(
                    [x for x, _ in thin], [y for _, y in thin], "o", markersize=15, color=tint,
                    fillstyle="none",
                )  # fmt: skip
                if good and curve.end:
                    axis.scatter(*good[-1], marker="X", s=90, color=tint, zorder=5, edgecolors="white")
            for point in _printed(case):
                tint = LINES[point.contender][0]
                axis.scatter(point.seq_len, point.throughput, marker="*", s=150, color=tint, zorder=6)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            rates = [p.throughput for curve in curves.values() for p in curve.points if p.throughput]
            rates += [point.throughput for point in _printed(case)]
            steps = [digit * 10.0**power for power in range(-1, 7) for digit in (1, 2, 5)]
            shown = [step for step in steps if min(rates, default=1) / 2 <= step <= 2 * max(rates, default=1)]
            axis.set_yticks(shown, [f"{step:,g}" for step in shown])
            axis.set_xticks(list(study.lengths), [short(length) for length in study.lengths])
            axis.minorticks_off()
            axis.tick_params(labelbottom=True)
            axis.grid(alpha=0.25)
            axis.set_title(_panel_title(case, curves), fontsize=11.5)
            axis.set_ylabel("tokens/s per device")
        for axis in axes[len(study.cases) :]:
            axis.set_visible(False)
        axes[0].scatter([], [], marker="X", s=90, color="#515a5a", label="the last length that fits")
        if any(point.small for one in study.curves for curve in one.values() for point in curve.points):
            axes[0].plot(
                [],
                [],
                "o",
                markersize=15,
                fillstyle="none",
                color="#515a5a",
                label="of the smallest step only",
            )
        axes[0].scatter([], [], marker="*", s=130, color="#515a5a", label="published")
        handles, labels = axes[0].get_legend_handles_labels()
        axes[0].get_figure().legend(handles, labels, loc="outside lower center", ncols=2 * columns)  # type: ignore[union-attr]
    return path


def _printed(case: Case) -> list[Published]:
    """The published points of a case."""
    return [one for one in POINTS if one.model == case.model.name and one.devices == case.world_size]


def ratio_figure(path: Path, study: Study) -> Path:
    """MoP's throughput over FSDP2's at each length, a line a network; an arrow up where only MoP runs."""
    low, high = _span(study.curves)
    top = max(1.35, 1.12 * high)
    with figure(path, 10, 5) as (axis,):
        axis.axhline(1.0, color="#909497", linewidth=1)
        for index, (case, curves) in enumerate(zip(study.cases, study.curves, strict=True)):
            tint = SERIES[index % len(SERIES)]
            for name, line, width in (("fsdp2", "-", 2.4), ("fsdp2_node", ":", 1.6)):
                if name not in curves:
                    continue
                found = [
                    (point.seq_len, value)
                    for point in curves["mop"].points
                    if (value := ratio(curves["mop"], curves[name], point.seq_len))
                ]
                label = case_name(case) if name == "fsdp2" else None
                axis.plot(
                    [x for x, _ in found], [y for _, y in found], linestyle=line, linewidth=width,
                    marker="o", markersize=4, color=tint, label=label,
                )  # fmt: skip
                alone = [
                    point.seq_len
                    for point in curves["mop"].points
                    if point.fits
                    and name == "fsdp2"
                    and point.seq_len > max((x for x, _ in found), default=0)
                ]
                height = [top - 0.02 - 0.035 * index] * len(alone)
                axis.scatter(alone, height, marker="^", s=70, color=tint)
        axis.plot([], [], color="#515a5a", label="over FSDP2, chunked loss, any CP")
        axis.plot([], [], ":", color="#515a5a", label="over FSDP2, full logits, CP in a node")
        axis.scatter([], [], marker="^", s=70, color="#515a5a", label="only MoP fits")
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(study.lengths), [short(length) for length in study.lengths])
        axis.minorticks_off()
        axis.set_ylim(min(0.8, 0.95 * low), top)
        axis.set_ylabel("throughput of MoP over that of FSDP2")
        axis.set_xlabel("context length, tokens")
        axis.grid(axis="y", alpha=0.3)
        axis.set_title(f"Where both run, MoP is {low:.2f}x to {high:.2f}x as fast as the freest FSDP2")
        legend_below(axis, 4)
    return path


def _panel_title(case: Case, curves: Mapping[str, Curve]) -> str:
    title = f"{case_name(case)}\nMoP {reach(curves['mop'])}, FSDP2 {reach(curves['fsdp2'])}"
    if "fsdp2_node" in curves:
        title += f", {reach(curves['fsdp2_node'])} with full logits in a node"
    return title


def reach_figure(path: Path, study: Study) -> Path:
    """The longest context of each contender on each cluster, with what stops it."""
    count = len(study.contenders)
    least = min(study.lengths)
    with figure(path, 11, 1.2 + 0.30 * (count + 1) * len(study.cases)) as (axis,):
        ticks, names = [], []
        place = 0.0
        for case, curves in zip(study.cases, study.curves, strict=True):
            ticks.append(place + (count - 1) / 2)
            names.append(case_name(case))
            for name, curve in curves.items():
                longest = curve.longest
                far = longest.seq_len if longest else least / 2
                axis.barh(place, far - least / 2, left=least / 2, color=LINES[name][0], height=0.8)
                stop = f", then {curve.end.stopped_by}" if curve.end else ""
                text = f" {curve.contender.label}: {reach(curve)}{stop}"
                axis.text(far, place, text, va="center", fontsize=9)
                place += 1
            place += 0.8
        axis.set_xscale("log", base=2)
        axis.set_xlim(least / 2, max(study.lengths) * 16)
        axis.margins(y=0.01)
        axis.set_xticks(list(study.lengths), [short(length) for length in study.lengths])
        axis.minorticks_off()
        axis.set_yticks(ticks, names)
        axis.invert_yaxis()
        axis.set_xlabel("longest context that fits, tokens (doubling)")
        axis.set_title(
            f"MoP reaches {_range(study, 'mop')} tokens, FSDP2 {_far(study)}, by how it is restricted"
        )
    return path


def case_table(case: Case, curves: Mapping[str, Curve], lengths: Sequence[int]) -> Table:
    """Throughput by contender and length, and MoP's over each baseline's."""
    rows = [
        [curve.contender.label, *(cell(curve.at(length)) for length in lengths)] for curve in curves.values()
    ]
    for name, curve in curves.items():
        if name != "mop":
            ratios = [times(ratio(curves["mop"], curve, length)) for length in lengths]
            if any(ratios):
                rows.append([f"MoP over {curve.contender.label}", *ratios])
    return Table(["tokens/s per device at", *(short(length) for length in lengths)], rows)


def rules_table(study: Study) -> Table:
    """Who competes under which rules, and how far each gets."""
    rows = []
    for contender in study.contenders:
        cells = [contender.label, contender.rules]
        for curves in study.curves:
            curve = curves[contender.name]
            stop = f" ({curve.end.stopped_by})" if curve.end else ""
            cells.append(f"{reach(curve)}{stop}")
        rows.append(cells)
    return Table(["contender", "rules", *(case_name(case) for case in study.cases)], rows)


def strategies_table(study: Study) -> Table:
    """The strategies behind the points: at 128K and at the longest context."""
    rows = []
    for case, curves in zip(study.cases, study.curves, strict=True):
        for curve in curves.values():
            near, far = curve.at(128 * 1024), curve.longest
            for point in (near, far if far is not near else None):
                if point is None or point.result is None or not point.fits:
                    continue
                result = point.result
                rows.append(
                    [
                        case_name(case), curve.contender.label, short(point.seq_len),
                        f"{point.global_batch:,}", describe(result.strategy),
                        format_bytes(result.peak_memory), format_bytes(result.host_memory),
                        f"{result.mfu:.0%}",
                    ]
                )  # fmt: skip
    return Table(["case", "contender", "context", "batch", "strategy", "device", "host", "MFU"], rows)


def variants_table(study: Study) -> Table:
    """One changed assumption a line: throughputs, ratio and reach."""
    lengths = [length for length in (128 * 1024, 1024 * 1024) if length in study.lengths] or study.lengths[:1]
    columns = ["assumption", "why"]
    for length in lengths:
        columns += [f"MoP at {short(length)}", f"FSDP2 at {short(length)}", "ratio"]
    columns += ["MoP reaches", "FSDP2 reaches", "full logits", "CP in a node", "in half a node", "no offload"]
    rows = []
    for variant, curves in study.variants:
        cells = [variant.label, variant.why]
        for length in lengths:
            cells += [cell(curves["mop"].at(length)), cell(curves["fsdp2"].at(length))]
            cells.append(times(ratio(curves["mop"], curves["fsdp2"], length)))
        cells += [
            reach(curves[name]) if name in curves and not variant.lengths else ""
            for name in ("mop", "fsdp2", "fsdp2_full", "fsdp2_node", "fsdp2_half_node", "fsdp2_device")
        ]
        rows.append(cells)
    return Table(columns, rows)


def published_table(study: Study) -> Table | None:
    """The printed points beside ours; None where no case is one of theirs."""
    rows = []
    for case, curves in zip(study.cases, study.curves, strict=True):
        for point in _printed(case):
            curve = curves.get(point.contender)
            found = curve.at(point.seq_len) if curve else None
            if curve is None or found is None or not found.throughput:
                continue
            rows.append(
                [
                    case_name(case), curve.contender.label, short(point.seq_len), f"{point.throughput:,.0f}",
                    point.note, f"{found.throughput:,.0f}", times(found.throughput / point.throughput),
                ]
            )  # fmt: skip
    columns = ["case", "contender", "context", "published", "how", "simulated", "simulated / published"]
    return Table(columns, rows) if rows else None


def small_step(study: Study) -> str:
    """Where the printed ratio can come from: MoP's whole step over FSDP2's with one sequence a step."""
    found = {variant.name: curves for variant, curves in study.variants}
    length = 128 * 1024
    small = found.get("step_8k", {})
    if "base" not in found or not {"fsdp2_offloaded", "fsdp2_device"} <= set(small):
        return ""
    ours, theirs = found["base"]["mop"].at(length), small["fsdp2_offloaded"].at(length)
    resident = small["fsdp2_device"].at(length)
    if not ours or not theirs or not ours.throughput or not theirs.throughput:
        return ""
    return (
        f"The most tokens of one forward and backward on 16 devices are printed too: "
        f"{LARGEST_STEP['mop'] / 1e6:g}M for MoP, {LARGEST_STEP['fsdp2_full'] / 1e3:g}K for FSDP2, one "
        f"sequence. With one sequence a step, FSDP2 with full logits and CPU offload is simulated at "
        f"{cell(theirs)} tokens/s per device (the host's update is paid by that one sequence), with nothing "
        f"on the host at {cell(resident)}; MoP with its whole step at {cell(ours)}: "
        f"{ours.throughput / theirs.throughput:.1f}x over CPU offload, where 7.6x is printed. So the printed "
        "ratio is within reach of the simulation only where the baseline offloads everything and does not "
        "accumulate gradients. The printed rates, MoP's included, lie below the simulated throughout."
    )


def write_context(
    folder: Path, study: Study, facts: dict[str, str], assumptions: Sequence[str]
) -> list[Path]:
    """index.md, index.html and the figures; returns what was written."""
    written = [
        throughput_figure(folder / "throughput.png", study),
        ratio_figure(folder / "ratio.png", study),
        reach_figure(folder / "reach.png", study),
    ]
    sections = [
        Section(
            "Throughput over context length",
            "Both axes are logarithmic. A cross marks the last length that fits before memory ends, a ring "
            "what fits with the smallest step only.",
            picture=("throughput.png", "tokens/s per device over context length, a panel a network"),
        ),
        Section(
            "MoP over FSDP2",
            "The same whole steps, in as many microbatches as are fastest for each.",
            picture=("ratio.png", "the ratio of throughputs over context length, a line a network"),
        ),
        Section(
            "How far, and what stops it",
            "The longest context, of lengths that double; in brackets the category that crosses the limit in "
            f"the strategy that misses by least. A star: at risk, within 4 % of a limit. {smaller(study)} "
            + as_printed(study),
            rules_table(study),
            ("reach.png", "the longest context of each contender, by network"),
        ),
    ]
    for case, curves in zip(study.cases, study.curves, strict=True):
        sections.append(
            Section(case_name(case), finding(case, curves), case_table(case, curves, study.lengths))
        )
    printed = published_table(study)
    if printed:
        text = f"{SOURCE}. {small_step(study)}"
        sections.append(Section("Beside the published points", text, printed))
    if study.variants:
        sections.append(
            Section(
                f"What is not stated, over its plausible choices ({case_name(study.cases[0])})",
                "One assumption changed at a time; FSDP2 is the unrestricted one. Blank: as in the first "
                "line, since the reach is that of the smallest step and so not of the whole step's size.",
                variants_table(study),
            )
        )
    rows = [[line] for line in assumptions]
    sections.append(Section("What is assumed", "", Table(["assumption"], rows)))
    sections.append(Section("The strategies", "", strategies_table(study)))
    title = "Context length against throughput: MoP and FSDP2, simulated"
    return written + write_page(folder, Page(title, summary(study), sections, facts))
