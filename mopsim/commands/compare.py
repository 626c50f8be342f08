"""`mopsim compare`: several strategies side by side, as tables and figures."""

import sys
from typing import Any, cast

from mopsim.api.compare import compare
from mopsim.api.inputs import NoStrategyError
from mopsim.api.sweep import Hold, Setting
from mopsim.commands.console import human, say_notes, say_written
from mopsim.commands.options import keywords
from mopsim.commands.progress import progress, writing
from mopsim.common import io
from mopsim.common.command_line import NOTHING_FITS, as_typed
from mopsim.common.errors import MopError
from mopsim.common.outputs import check_outputs
from mopsim.common.values import listed
from mopsim.report.formats import read_formats
from mopsim.report.sweep import swept_table
from mopsim.report.tables import comparison
from mopsim.report.terminal import points

_SETTINGS = {"seq-len": "seq_len", "nodes": "nodes"}


def run(*, out: str | None, sweep: str | None, hold: str, formats: str, json: str | None, **job: Any) -> int:
    """Compare, show, then write the report into `out` if asked: a full disk loses no result. Returns the exit
    code: 3 where nothing fits."""
    check_outputs({"--json": json}, {"--out": out})
    swept = split_sweep(sweep) if sweep else None
    kinds = read_formats(formats)
    console = human(json)
    try:
        with progress(console, "comparing", None) as shown:
            found = compare(
                sweep=swept, hold=cast(Hold, hold.replace("-", "_")),
                progress=lambda done, total, text: shown(done, f"{done} of {total} done; {text}"),
                **keywords(job),
            )  # fmt: skip
    except NoStrategyError as error:
        print(f"mopsim: {error}", file=sys.stderr)
        return NOTHING_FITS
    level, refused = found.inputs.interval, list(found.refused.values())
    results = list(found.results.values())
    told = [found.headline(), *found.notes]
    console.print(comparison(results, found.inputs.where_of(results), level, refused=refused, said=told))
    if found.sweep:
        console.print(swept_table(found.sweep, level, refused))
    console.print(points(found.headline().splitlines()))
    say_notes(console, found.notes)
    command = as_typed("mopsim")
    with io.json_beside(json, found.to_json(command) if json else None), writing(console, out):
        written = found.write(out, command, kinds) if out else []
    say_written(console, *map(str, written))
    return 0 if found.any_fits else NOTHING_FITS


def split_sweep(text: str) -> tuple[Setting, list[str]]:
    """(setting, values) of 'seq-len=32K,64K' or 'nodes=1,2'. Raises MopError."""
    setting, _, values = text.partition("=")
    if setting not in _SETTINGS or not values:
        known = " or ".join(f"{name}=VALUE,VALUE,..." for name in _SETTINGS)
        raise MopError(f"--sweep: {text!r} is not {known}")
    return cast(Setting, _SETTINGS[setting]), listed(values, "--sweep")
