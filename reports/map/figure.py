"""The map as a figure: a panel for each cluster, the winner's colour, its lead in figures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from mopsim.report.style import figure, text_on
from mopsim.strategies import FAMILIES

COLOURS = dict(zip(FAMILIES, ("#ca6f1e", "#1b4f72", "#b7950b", "#85c1e9"), strict=True))
NOTHING = "#d5d8dc"
SURE = 0.9


def sure(row: dict[str, Any]) -> bool:
    """Whether the winner is the faster one with 0.9 or more, or the only one that fits."""
    return row["lead"] is None or row["lead"]["p_faster"] >= SURE


def draw(path: Path, rows: Sequence[dict[str, Any]], context: Callable[[int], str]) -> None:
    """Write the figure. context: how a number of tokens is said."""
    clusters = list(dict.fromkeys(row["cluster"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    contexts = sorted({row["seq_len"] for row in rows})
    columns = 2 if len(clusters) > 1 else 1
    lines = -(-len(clusters) // columns)
    with figure(path, 7.2 * columns, 1.0 + (0.9 + 0.62 * len(models)) * lines, lines, columns) as axes:
        for at, (axis, cluster) in enumerate(zip(axes, clusters, strict=False)):
            here = [row for row in rows if row["cluster"] == cluster]
            for row in here:
                _cell(axis, row, contexts.index(row["seq_len"]), models.index(row["model"]))
            axis.set(
                title=cluster,
                xlabel="sequence length, tokens" if at >= len(clusters) - columns else "",
                xlim=(0, len(contexts)),
                ylim=(len(models), 0),
                xticks=[0.5 + i for i in range(len(contexts))],
                xticklabels=[context(one) for one in contexts],
                yticks=[0.5 + i for i in range(len(models))],
                yticklabels=models,
            )
            axis.tick_params(length=0)
        for axis in axes[len(clusters) :]:
            axis.set_axis_off()
        handles, said = legend(rows)
        axes[0].figure.legend(
            handles=handles, loc="outside lower center", ncols=len(handles), title=said, title_fontsize=9
        )


def legend(rows: Sequence[dict[str, Any]]) -> tuple[list[Patch], str]:
    """(a patch for each colour, what the texts of cells mean), of what these cells show alone."""
    won = [row for row in rows if row["families"]]
    lost = [row for row in rows if not row["families"]]
    winners = {next(iter(row["families"])) for row in won}
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items() if name in winners]
    if lost:
        odds = " (P: the highest of those named)" if any(map(_likely, lost)) else ""
        handles.append(Patch(color=NOTHING, label=f"no plan fits with a probability of {SURE:g}{odds}"))
    alone = f"only one: no other family has a plan that fits with a probability of {SURE:g}, as described"
    marks = {
        f"hatched, ?: faster with a probability below {SURE:g}": not all(map(sure, won)),
        alone: any(row["lead"] is None for row in won),
    }
    said = "; ".join(mark for mark, shown in marks.items() if shown)
    cell = "in a cell: how many times as fast as the next best family, and tokens/s per GPU" if won else ""
    return handles, "\n".join(filter(None, (cell, said)))


def _likely(row: dict[str, Any]) -> float:
    """The highest probability to fit of the plans of a cell that nobody wins; 0: there is none."""
    return max((float(one["p_fits"]) for one in row["risky"].values()), default=0.0)


def _cell(axis: Axes, row: dict[str, Any], x: int, y: int) -> None:
    winner = next(iter(row["families"]), None)
    colour = COLOURS[winner] if winner else NOTHING
    hatch = None if sure(row) else "///"
    axis.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white", linewidth=2, hatch=hatch))
    if not winner:
        said = f"P {_likely(row):.2f}" if _likely(row) else "nothing"
        axis.text(x + 0.5, y + 0.5, said, ha="center", va="center", fontsize=9, color=text_on(colour))
        return
    lead = row["lead"]
    said = "only one" if lead is None else f"{lead['ratio']:.2f}x{'' if sure(row) else ' ?'}"
    rate = row["families"][winner]["tokens_per_s_per_device"]
    axis.text(
        x + 0.5, y + 0.5, f"{said}\n{rate:,.0f}", ha="center", va="center", fontsize=9,
        color=text_on(colour),
        bbox=None if hatch is None else {"facecolor": colour, "edgecolor": "none", "pad": 1.5},
    )  # fmt: skip
