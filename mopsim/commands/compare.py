"""`mopsim compare`: several strategies side by side, as tables and figures."""

import sys
from collections.abc import Sequence
from typing import cast

from mopsim.api.compare import Setting, compare
from mopsim.commands.console import human
from mopsim.commands.options import Job
from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.common.outputs import check_outputs
from mopsim.report.tables import comparison

_SETTINGS = {"seq-len": "seq_len", "nodes": "nodes"}


def run(
    job: Job,
    strategies: Sequence[str],
    out: str,
    sweep: str | None,
    runnable: bool,
    budget: int,
    json: str | None,
) -> None:
    """Compare, show, write the report into `out`."""
    check_outputs({"--json": json}, {"--out": out})
    swept = split_sweep(sweep) if sweep else None
    found = compare(strategies=strategies, sweep=swept, runnable=runnable, budget=budget, **job.keywords())
    written = found.write(out, " ".join(["mopsim", *sys.argv[1:]]))
    console = human(json)
    console.print(comparison(list(found.results.values()), found.inputs.where))
    console.print(f"{found.headline()} Written: {', '.join(str(path) for path in written)}")
    for note in found.notes:
        console.print(note, style="yellow")
    if json:
        io.write_json(json, found.to_json())


def split_sweep(text: str) -> tuple[Setting, list[str]]:
    """(setting, values) of 'seq-len=32K,64K' or 'nodes=1,2'. Raises MopError."""
    setting, _, values = text.partition("=")
    if setting not in _SETTINGS or not values:
        known = " or ".join(f"{name}=VALUE,VALUE,..." for name in _SETTINGS)
        raise MopError(f"--sweep: {text!r} is not {known}")
    return cast(Setting, _SETTINGS[setting]), [value.strip() for value in values.split(",")]
