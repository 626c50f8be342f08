"""The figures of a study of context lengths."""

from collections.abc import Mapping
from pathlib import Path

from mopsim.common.units import format_count
from mopsim.context.sweep import ContextCase, Curve
from mopsim.report.context import case_name, ratio, reach
from mopsim.report.palette import SERIES
from mopsim.report.style import figure, legend_below
from reports.context_throughput.words import Study, farthest, published_of, range_of, span

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


def throughput_figure(path: Path, study: Study) -> None:
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
            for point in published_of(case):
                tint = LINES[point.contender][0]
                axis.scatter(point.seq_len, point.throughput, marker="*", s=150, color=tint, zorder=6)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            rates = [p.throughput for curve in curves.values() for p in curve.points if p.throughput]
            rates += [point.throughput for point in published_of(case)]
            steps = [digit * 10.0**power for power in range(-1, 7) for digit in (1, 2, 5)]
            shown = [step for step in steps if min(rates, default=1) / 2 <= step <= 2 * max(rates, default=1)]
            axis.set_yticks(shown, [f"{step:,g}" for step in shown])
            axis.set_xticks(list(study.lengths), [format_count(length) for length in study.lengths])
            axis.minorticks_off()
            axis.tick_params(labelbottom=True)
            axis.grid(alpha=0.25)
            axis.set_title(_panel_title(case, curves), fontsize=11.5)
            axis.set_ylabel("tokens/s per device")
        for axis in axes[max(len(study.cases) - columns, 0) : len(study.cases)]:
            axis.set_xlabel("context length, tokens")
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
                label="fits with the smallest step only",
            )
        axes[0].scatter([], [], marker="*", s=130, color="#515a5a", label="published")
        handles, labels = axes[0].get_legend_handles_labels()
        axes[0].get_figure().legend(handles, labels, loc="outside lower center", ncols=2 * columns)  # type: ignore[union-attr]


def ratio_figure(path: Path, study: Study) -> None:
    """MoP's throughput over FSDP2's at each length, a line a network; a mark in a strip of its own, which
    has no scale, where only MoP runs, hollow where it fits with a probability below 0.9. No strip where there
    is no such length."""
    low, high = span(study.curves)
    drawn = [
        value
        for curves in study.curves
        for name in ("fsdp2", "fsdp2_node")
        if name in curves
        for point in curves["mop"].points
        if (value := ratio(curves["mop"], curves[name], point.seq_len))
    ]
    bottom, strip = min(0.8, 0.95 * low), max([1.1, *drawn]) + 0.03
    row = 0.05 * (strip - bottom)
    top = strip + row * (len(study.cases) + 1)
    lone = [_only_mop(curves) for curves in study.curves]
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
                    marker="o", markersize=5, markerfacecolor=tint if name == "fsdp2" else "white",
                    color=tint, label=label,
                )  # fmt: skip
            for length, certain in lone[index].items():
                axis.scatter(
                    length, top - row * (index + 1), marker="^", s=70, edgecolors=tint,
                    facecolors=tint if certain else "none",
                )  # fmt: skip
        axis.plot([], [], color="#515a5a", label="over FSDP2, chunked loss, any CP")
        axis.plot(
            [], [], ":", marker="o", markersize=5, markerfacecolor="white", color="#515a5a",
            label="over FSDP2, full logits, CP in a node",
        )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(study.lengths), [format_count(length) for length in study.lengths])
        axis.minorticks_off()
        axis.set_ylim(bottom, top if any(lone) else strip)
        axis.set_yticks([tick for tick in axis.get_yticks() if bottom <= tick <= strip])
        if any(lone):
            axis.axhspan(strip, top, color="#f2f3f4", zorder=0)
            axis.scatter([], [], marker="^", s=70, color="#515a5a", label="only MoP fits (0.9)")
            if not all(certain for found in lone for certain in found.values()):
                axis.scatter(
                    [], [], marker="^", s=70, edgecolors="#515a5a", facecolors="none",
                    label="likewise, below 0.9",
                )  # fmt: skip
            axis.text(
                0.01, top - row, "only MoP fits: no ratio", va="center", fontsize=10, color="#515a5a",
                transform=axis.get_yaxis_transform(),
            )  # fmt: skip
        axis.set_ylabel("throughput of MoP over that of FSDP2")
        axis.set_xlabel("context length, tokens")
        axis.grid(axis="y", alpha=0.3)
        axis.set_title(
            f"Where both run, MoP is {low:.2f}x to {high:.2f}x as fast as the least restricted FSDP2"
        )
        legend_below(axis, 4)


def _only_mop(curves: Mapping[str, Curve]) -> dict[int, bool]:
    """Lengths that MoP runs, beyond the last at which both run with the whole step, and whether it fits with
    a probability of 0.9 there."""
    mop = curves["mop"]
    both = [point.seq_len for point in mop.points if ratio(mop, curves["fsdp2"], point.seq_len)]
    last = max(both, default=0)
    return {point.seq_len: point.sure for point in mop.points if point.fits and point.seq_len > last}


def _panel_title(case: ContextCase, curves: Mapping[str, Curve]) -> str:
    title = f"{case_name(case)}\nMoP {reach(curves['mop'])}, FSDP2 {reach(curves['fsdp2'])}"
    if "fsdp2_node" in curves:
        title += f", {reach(curves['fsdp2_node'])} with full logits in a node"
    return title


def reach_figure(path: Path, study: Study) -> None:
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
                stop = f", stopped by {curve.end.stopped_by}" if curve.end else ""
                text = f" {curve.contender.label}: {reach(curve)}{stop}"
                axis.text(far, place, text, va="center", fontsize=9)
                place += 1
            place += 0.8
        axis.set_xscale("log", base=2)
        axis.set_xlim(least / 2, max(study.lengths) * 16)
        axis.margins(y=0.01)
        axis.set_xticks(list(study.lengths), [format_count(length) for length in study.lengths])
        axis.minorticks_off()
        axis.set_yticks(ticks, names)
        axis.invert_yaxis()
        axis.set_xlabel(
            "longest context that fits, tokens (*: may not fit; \u2020: with the smallest step only)"
        )
        axis.set_title(
            f"MoP reaches {range_of(study, 'mop')} tokens, FSDP2 {farthest(study)} where it runs, by rules"
        )
