"""One look for every figure: a colour per category and component, sizes readable at a glance, written
aside."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from textwrap import wrap
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import ScaledTranslation

from mopsim.common.io import write_bytes
from mopsim.common.units import UNITS
from mopsim.report.formats import also

RC: Any = {
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "pdf.fonttype": 42,
    "svg.hashsalt": "mopsim",
}


def text_on(background: str) -> str:
    """Black or white, whichever stands out more (WCAG 2.1: contrast by relative luminance)."""
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(background)
    )
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "white"


def byte_scale(largest: float) -> tuple[str, float]:
    """The unit in which `largest` bytes read well, and its size."""
    unit = next((unit for unit in ("TiB", "GiB", "MiB") if largest >= UNITS[unit]), "KiB")
    return unit, UNITS[unit]


def time_scale(largest: float) -> tuple[str, float]:
    """The unit in which `largest` seconds read well, and its size."""
    return ("s", 1.0) if largest >= 1 else ("ms", 1e-3)


_SPARE = 3
"""Letters fewer in a wrapped line than fit of average width."""
_ROOM = 0.9
"""Share of a figure's width that a legend takes: one that is wider takes it from the axes."""
_UNDATED: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
"""So that a figure of the same numbers is the same file."""


@contextmanager
def figure(
    path: Path, width: float, height: float, rows: int = 1, columns: int = 1, **grid: Any
) -> Iterator[list[Axes]]:
    """Axes, row by row, of a figure that is saved to `path` at the end (and beside it, under `saved_as`),
    aside and then renamed."""
    with matplotlib.rc_context({**RC, "backend": "agg"}):
        fig = Figure(figsize=(width, height), layout="constrained")
        axes = fig.subplots(rows, columns, squeeze=False, **grid)
        yield [axis for row in axes for axis in row]
        _as_written(fig)
        _wrap_titles(fig)
        for kind in dict.fromkeys((path.suffix[1:], *also())):
            _save(fig, path.with_suffix(f".{kind}"))


def _as_written(fig: Figure) -> None:
    """No text but the numbers of an axis is mathematics: names and prices have dollars."""
    lines = [line for axis in fig.axes for line in (axis.xaxis, axis.yaxis)]
    numbers = {label for line in lines for label in line.get_ticklabels(which="both")}
    for text in fig.findobj(Text):
        if text not in numbers:
            text.set_parse_math(False)


def _wrap_titles(fig: Figure) -> None:
    """Titles in as many lines as the figure's width asks for: one that is longer ends at its edge."""
    place = matplotlib.rcParams["axes.titlelocation"]
    titles = [
        text
        for axis in fig.axes
        for text in axis.get_children()
        if isinstance(text, Text) and text.get_text() and text.get_text() == axis.get_title(loc=place)
    ]
    for title in titles:
        title.set_in_layout(False)  # else the axes make room for all of it
    if titles:
        fig.draw_without_rendering()
    for title in titles:
        title.set_in_layout(True)
        box, lines = title.get_window_extent(), title.get_text().splitlines()
        if box.x1 > fig.bbox.x1:
            fits = int(max(map(len, lines)) * (fig.bbox.x1 - box.x0) / box.width) - _SPARE
            title.set_text("\n".join(part for line in lines for part in wrap(line, max(fits, 1))))


def _save(fig: Figure, path: Path) -> None:
    kind, drawn = path.suffix[1:], BytesIO()
    fig.savefig(drawn, format=kind, metadata=_UNDATED.get(kind))
    write_bytes(path, drawn.getvalue())


def legend_below(axis: Axes, columns: int = 6) -> None:
    """A legend that covers neither data nor the axis' label: half an inch under the axis, of any height, in
    as many columns, at most, as the figure has room for."""
    handles, labels = axis.get_legend_handles_labels()
    under = axis.transAxes + ScaledTranslation(0, -0.5, axis.figure.dpi_scale_trans)
    for count in range(min(columns, len(labels)), 0, -1):
        legend = axis.legend(
            handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=under, ncols=count
        )
        if legend.get_window_extent().width < _ROOM * axis.figure.bbox.width:
            break
