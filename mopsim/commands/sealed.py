"""`mopsim validate --sealed`: what became of a prediction that was sealed before its run."""

from collections.abc import Callable
from pathlib import Path

from rich.table import Table

from mopsim.calibrate.runs import load_measurement, measured_in
from mopsim.commands.console import human
from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.common.outputs import check_outputs
from mopsim.common.units import format_bytes, format_probability, format_seconds
from mopsim.report.tables import between
from mopsim.report.terminal import table
from mopsim.validate.sealed import Outcome, open_sealed, outcomes, score_json

NAMES: dict[str, tuple[str, Callable[[float], str]]] = {
    "step_time_s": ("step", format_seconds),
    "peak_memory_bytes": ("device memory", format_bytes),
}


def run(sealed: str, measurements: str | None, json: str | None) -> None:
    """Check the hash, score, show, write JSON."""
    if not measurements:
        raise MopError("--measurements: not given: --sealed is scored by the run that it was made for")
    check_outputs({"--json": json}, inputs={"--measurements": measured_in(measurements)})
    found, measured = open_sealed(Path(sealed)), load_measurement(measurements)
    console = human(json)
    console.print(_shown(outcomes(found, measured), found.interval))
    version = found.versions.get("mopsim", "?")
    console.print(
        f"{found.plan.line}, P(fits) {format_probability(found.p_fits)}: sealed {found.made} "
        f"by mopsim {version}, unchanged since"
    )
    if measured.routing != found.plan.training.routing:
        console.print(
            f"note: sealed for routing {found.plan.training.routing}, measured with {measured.routing}",
            style="yellow",
        )
    if measured.disturbances:
        console.print(
            f"note: the run was disturbed, its step is no fair test: {'; '.join(measured.disturbances)}; "
            "measure again while nothing else runs",
            style="yellow",
        )
    if measured.elsewhere:
        console.print(f"note: {measured.elsewhere}", style="yellow")
    if json:
        io.write_json(json, score_json(found, measured))


def _shown(rows: list[Outcome], level: float) -> Table:
    shown = table("sealed prediction", ("",), ("predicted", f"{level:.0%}", "measured", "error", "within"))
    for one in rows:
        name, show = NAMES[one.quantity]
        ends = between((one.low, one.high), show)
        cells = (show(one.predicted), ends, show(one.measured), f"{one.error:+.1%}")
        shown.add_row(name, *cells, "yes" if one.within else "no")
    return shown
