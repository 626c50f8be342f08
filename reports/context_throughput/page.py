"""Context length against throughput, as a report: figures, tables, and sentences that follow from them."""

from collections.abc import Sequence
from pathlib import Path

from mopsim.common.units import format_bytes, format_count
from mopsim.report.context import case_name, case_table, cell, ratio, reach, step_of, times
from mopsim.report.page import Page, Section, Table, write_page
from mopsim.report.tables import describe
from reports.context_throughput.figures import ratio_figure, reach_figure, throughput_figure
from reports.context_throughput.published import LARGEST_STEP, SOURCE
from reports.context_throughput.words import Study, as_printed, finding, published_of, smaller, summary


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
                        case_name(case), curve.contender.label, format_count(point.seq_len),
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
        columns += [f"MoP at {format_count(length)}", f"FSDP2 at {format_count(length)}", "ratio"]
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
        for point in published_of(case):
            curve = curves.get(point.contender)
            found = curve.at(point.seq_len) if curve else None
            if curve is None or found is None or not found.throughput:
                continue
            rows.append(
                [
                    case_name(case), curve.contender.label, format_count(point.seq_len),
                    f"{point.throughput:,.0f}", point.note, f"{found.throughput:,.0f}",
                    times(found.throughput / point.throughput),
                ]
            )  # fmt: skip
    columns = ["case", "contender", "context", "published", "how", "simulated", "simulated / published"]
    return Table(columns, rows) if rows else None


def small_step(study: Study) -> str:
    """Where the printed ratio can come from: MoP's whole step over FSDP2's with one sequence a step."""
    found = {variant.name: curves for variant, curves in study.variants}
    length = 128 * 1024
    small = found.get("step_8k", {})
    if "base" not in found or not {"mop", "fsdp2_offloaded", "fsdp2_device"} <= set(small):
        return ""
    ours, alike = found["base"]["mop"].at(length), small["mop"].at(length)
    theirs, resident = small["fsdp2_offloaded"].at(length), small["fsdp2_device"].at(length)
    if not (ours and alike and theirs and ours.throughput and alike.throughput and theirs.throughput):
        return ""
    return (
        f"The most tokens of one forward and backward on 16 devices are printed too: "
        f"{LARGEST_STEP['mop'] / 1e6:g}M for MoP, {LARGEST_STEP['fsdp2_full'] / 1e3:g}K for FSDP2, one "
        f"sequence. With one sequence a step, FSDP2 with full logits and CPU offload is simulated at "
        f"{cell(theirs)} tokens/s per device, since that one sequence pays for the host's update. With "
        f"nothing on the host it is simulated at {cell(resident)}. MoP with as small a step is simulated at "
        f"{cell(alike)}, {alike.throughput / theirs.throughput:.1f}x over CPU offload, and with its whole "
        f"step at {cell(ours)}, {ours.throughput / theirs.throughput:.1f}x; 7.6x is printed. So the "
        "simulation reaches the printed ratio only if the baseline offloads everything and does not "
        f"accumulate gradients. {_simulated_over_printed(study)}"
    )


def _simulated_over_printed(study: Study) -> str:
    """How far the simulated rates lie from the printed ones."""
    found = [
        at.throughput / point.throughput
        for case, curves in zip(study.cases, study.curves, strict=True)
        for point in published_of(case)
        if (curve := curves.get(point.contender)) and (at := curve.at(point.seq_len)) and at.throughput
    ]
    ends = f"{min(found):.2f} to {max(found):.1f}" if found else "no known number of"
    return f"The simulated rates are {ends} times the printed ones."


def write_context(folder: Path, study: Study, facts: dict[str, str], assumptions: Sequence[str]) -> None:
    """index.md, index.html and the figures."""
    throughput_figure(folder / "throughput.png", study)
    ratio_figure(folder / "ratio.png", study)
    reach_figure(folder / "reach.png", study)
    sections = [
        Section(
            "Throughput over context length",
            "Both axes are logarithmic. A cross marks the last length that fits before memory ends. A ring "
            "marks lengths that fit with the smallest step only.",
            picture=("throughput.png", "tokens/s per device over context length, a panel a network"),
        ),
        Section(
            "MoP over FSDP2",
            "Both run the same whole steps, each with the number of microbatches that is fastest for it. A "
            "plan that fits goes before a faster one that may not fit. A more restricted row (starred) can "
            "therefore be faster; MoP's lead over it is the smaller one in the tables. Larger steps narrow "
            "the lead (see the variants). Simulated rates lie above the published ones (see below). A "
            "triangle: only MoP fits. It is hollow if MoP fits with a probability below 0.9.",
            picture=("ratio.png", "the ratio of throughputs over context length, a line a network"),
        ),
        Section(
            "How far, and what stops it",
            "The table has the longest context, of lengths that double. In brackets is the category that "
            "takes most at the peak of the strategy that misses by least. A star: the length fits with a "
            "probability below 0.9. "
            f"{smaller(study)} " + as_printed(study),
            rules_table(study),
            ("reach.png", "the longest context of each contender, by network"),
        ),
    ]
    for case, curves in zip(study.cases, study.curves, strict=True):
        said = f"Whole steps have {step_of(case)}. {finding(case, curves)}"
        sections.append(Section(case_name(case), said, case_table(curves, study.lengths)))
    printed = published_table(study)
    if printed:
        text = f"{SOURCE}. {small_step(study)}"
        sections.append(Section("Beside the published points", text, printed))
    if study.variants:
        sections.append(
            Section(
                f"What is not stated, over its plausible choices ({case_name(study.cases[0])})",
                "Each line changes one assumption. FSDP2 is the unrestricted contender. Blank: as in the "
                "first line, since the reach is that of the smallest step, whatever the whole step's size.",
                variants_table(study),
            )
        )
    rows = [[line] for line in assumptions]
    sections.append(Section("What is assumed", "", Table(["assumption"], rows)))
    sections.append(Section("The strategies", "", strategies_table(study)))
    title = "Context length against throughput: MoP and FSDP2, simulated"
    write_page(folder, Page(title, summary(study), sections, facts))
