"""`mopsim calibrate`: a corrected profile from measured runs."""

from collections.abc import Sequence
from math import fsum
from pathlib import Path

from rich.table import Table

from mopsim.calibrate.profile import CalibrationResult, Residual, calibrate
from mopsim.calibrate.runs import check_output, load_measurement, measured_in, on_stack
from mopsim.commands.console import human
from mopsim.common import io
from mopsim.common.outputs import check_outputs
from mopsim.common.units import format_bytes, format_seconds
from mopsim.report.terminal import table
from mopsim.spec.plan import Measurement
from mopsim.spec.profiles import load_profile
from mopsim.spec.routing import in_words
from mopsim.spec.stacks import load_stack


def run(
    *, profile: str, measurements: Sequence[str], more: Sequence[str] | None, out: str, stack: str | None,
    json: str | None,
) -> None:  # fmt: skip
    """Fit, show what remains, write the new profile."""
    check_output(profile, out)
    measurements = [*measurements, *(more or ())]
    runs = [measured_in(one) for one in measurements]
    check_outputs({"--out": out, "--json": json}, inputs={"--measurements": runs})
    known = load_profile(profile, "profile")
    given = [load_measurement(ref) for ref in measurements]
    if stack:
        software = load_stack(stack, "--stack")
        given = [on_stack(one, software) for one in given]
    result = calibrate(known, given)
    console = human(json)
    console.print(residuals(result))
    for name, ends in result.intervals.items():
        said = " to ".join(f"{end - 1:+.0%}" for end in ends)
        console.print(f"90 % of further runs on {name}: {said} of the prediction")
    for line in warnings(result, known.name):
        console.print(line)
    for one, peak in zip(given, result.peaks, strict=True):
        if one.routing != one.plan.training.routing:
            console.print(_routed(one, peak))
        if one.disturbances or one.resumed:
            console.print(_apart(one))
    io.write_yaml(Path(out), result.profile)
    console.print(f"{result.profile.name} (digest {io.digest(result.profile)}) written to {out}")
    if json:
        io.write_json(json, result.to_json())


def _routed(run: Measurement, peak: int) -> str:
    """Of which routing a run's peak is, where it is not the plan's."""
    own, planned = map(in_words, (run.routing, run.plan.training.routing))
    return (
        f"run of {run.plan.strategy.name} ({io.digest(run)}): simulated with its own routing, {own}, "
        f"not the plan's, {planned}: so its peak is {format_bytes(run.peak_memory)} against "
        f"{format_bytes(peak)} predicted, and the profile learns from that"
    )


def _apart(run: Measurement) -> str:
    """What sets a run apart that others disturbed, or that did not run in one go."""
    said = run.disturbances
    if said:
        said[-1] += f": it counts as {run.quiet:.2f} runs"
    if run.resumed:
        said.append(f"resumed: the steps of all its {run.resumed + 1} launches count")
    return f"run of {run.plan.strategy.name} ({io.digest(run)}): {'; '.join(said)}"


def warnings(result: CalibrationResult, before: str) -> list[str]:
    """Why a new profile may be worth little. before: the name of the profile that was calibrated."""
    said, runs = [], sum(result.weights)
    missed, by_known = result.miss("held_out"), result.miss("before")
    if missed > by_known:
        said.append(
            f"worse than {before}: runs are off by a factor of {missed:.2f} where they are held out, by "
            f"{by_known:.2f} before: use {before}"
        )
    if runs < 1:
        said.append(f"all runs together count as {runs:.2f} runs: measure again while nothing else runs")
    if len(result.runs) == 1:
        said.append(
            "one run: no run was held out to tell the error, and what another runtime costs is guessed; add "
            "a short run of another strategy and runtime"
        )
    return said


def residuals(result: CalibrationResult) -> Table:
    """Measured and predicted seconds by kind of work and run."""
    names = ("measured", "before", "after", "held out")
    shown = table("seconds of one step, predicted against measured", ("run", "kind"), names)
    rows = [one for row in result.residuals for one in (*_rest(row, result.residuals), row)]
    for row in rows:
        errors = (row.error(one) for one in (row.before, row.after, row.held_out))
        cells = ("" if one is None else f"{one:+.0%}" for one in errors)
        measured = format_seconds(row.measured) if row.measured else "not measured"
        style = "bold" if row.kind == "step" else None
        shown.add_row(row.run, row.kind, measured, *cells, style=style)
    return shown


def _rest(step: Residual, rows: Sequence[Residual]) -> list[Residual]:
    """Before a step's row what its kinds leave of it: time in no op, by Python or waits; none where work that
    runs beside other work adds up to more."""
    kinds = [row for row in rows if row.run == step.run and row.kind != "step"]

    def left(which: str) -> float:
        return max(float(getattr(step, which)) - fsum(getattr(row, which) for row in kinds), 0.0)

    if step.kind != "step" or not left("measured"):
        return []
    held = None if step.held_out is None else left("held_out")
    return [Residual(step.run, "in no kind", left("measured"), left("before"), left("after"), held, 0, 0)]
