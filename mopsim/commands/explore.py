"""`mopsim explore`: a result as one offline page."""

from collections.abc import Sequence
from pathlib import Path

from mopsim.api.explore import explore
from mopsim.commands.console import human
from mopsim.common.outputs import check_outputs


def run(
    *, result: str, out: str, timelines: int, models: Sequence[str] | None, hardware: Sequence[str] | None
) -> None:
    """Read the JSON of a command, write the page, say where and how large it is."""
    check_outputs({"--out": out})
    notes = explore(result, out, timelines=timelines, models=models or (), hardware=hardware or ())
    console = human(None)
    for note in notes:
        console.print(note, style="yellow")
    console.print(f"Written: {out} ({Path(out).stat().st_size / 1e3:,.0f} kB)")
