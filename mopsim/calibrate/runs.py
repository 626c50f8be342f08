"""Runs to calibrate on: where they are read, and what they are told to be."""

from pathlib import Path

import msgspec

from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.spec import upgrade
from mopsim.spec.plan import Measurement
from mopsim.spec.stack import Stack


def measured_in(ref: str | Path) -> Path:
    """The file of a run's measurement; `ref` is its directory, or the file itself."""
    path = Path(ref)
    return path / "measurement.yaml" if path.is_dir() else path


def load_measurement(ref: str | Path) -> Measurement:
    """The measurement of a run: its directory, or the file itself. Raises MopError in one line."""
    path = Path(ref)
    if not io.exists(path):
        raise MopError(f"measurements: {str(ref)!r} is neither a run directory nor a measurement.yaml")
    target = measured_in(path)
    if not target.exists():
        raise MopError(f"measurements: {str(ref)!r} has no measurement.yaml: the run has not finished")
    found = upgrade.load_measurement(target)
    if not found.step_times:
        rule = "has no time of a step: none ran compiled, as its plan does; train it for more steps"
        raise MopError(f"measurements: {str(ref)!r} {rule}")
    return found


def on_stack(measurement: Measurement, stack: Stack) -> Measurement:
    """The same run, told to be of another program. Raises MopError where it does not do the
    strategy."""
    plan = measurement.plan
    strategy = msgspec.structs.replace(plan.strategy, stack=stack.name)
    plan = msgspec.structs.replace(plan, strategy=strategy, stack=stack)
    return msgspec.structs.replace(measurement, plan=plan)


def check_output(profile: str | Path, out: str | Path) -> None:
    """Raise MopError where the new profile would be written over the one it is fitted from."""
    if io.exists(Path(profile)) and io.exists(Path(out)) and Path(out).samefile(profile):
        raise MopError(f"out: {str(out)!r} is the profile that is calibrated: name another file, it is kept")
