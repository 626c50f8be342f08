"""`mopsim explore`: a result as one offline page."""

from collections.abc import Sequence
from pathlib import Path

from mopsim.api.explore import explore
from mopsim.commands.console import human, say_notes
from mopsim.common import io
from mopsim.common.outputs import check_outputs


def run(
    *, result: str, out: str, timelines: int, models: Sequence[str] | None, hardware: Sequence[str] | None,
    json: str | None,
) -> None:  # fmt: skip
    """Read the JSON of a command, write the page, say where and how large it is."""
    check_outputs({"--out": out, "--json": json})
    notes = explore(result, out, timelines=timelines, models=models or (), hardware=hardware or ())
    console, size = human(json), Path(out).stat().st_size
    say_notes(console, notes)
    console.print(f"Written: {out} ({size / 1e3:,.0f} kB)")
    if json:
        io.write_json(json, {"out": out, "bytes": size, "notes": notes})
