"""mopsim.explore: a result as one page that needs no network."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mopsim.api.inputs import AnyHardware, AnyModel, read_hardware, read_model
from mopsim.common import io
from mopsim.common.arguments import named
from mopsim.common.errors import MopError
from mopsim.common.json_text import parse_json
from mopsim.common.values import first_unreadable
from mopsim.engine import SimResult, simulate
from mopsim.report.explore.page import html
from mopsim.report.explore.steps import ExplorerStep
from mopsim.report.explore.views import explorer, kind_of, readable, steps_of
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.model import ModelSpec
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec


@named
def explore(
    result: Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    timelines: int = 3,
    models: Sequence[AnyModel] = (),
    hardware: Sequence[AnyHardware] = (),
) -> list[str]:
    """Write `out`, one HTML file of tables, plots and timelines of a result. It fetches nothing.

    result: the result of simulate, search, compare or size, or a JSON file that a command wrote, also
    `mopsim context` or `mopsim validate`. timelines: number of steps, the first ones, that are simulated
    again for their timelines. models: the result's models, if they are not presets. hardware: the result's
    machine types, if they are not shipped profiles.

    Returns notes: which timelines are left out, and why. Raises MopError."""
    origin = str(result) if isinstance(result, str | Path) else "result"
    data = read_result(Path(result)) if isinstance(result, str | Path) else _plain(result)
    kind = kind_of(data, origin)
    known: dict[str, dict[str, Any]] = {
        "model": {io.digest(one): one for one in map(read_model, models)},
        "profile": {io.digest(one): one for one in map(read_hardware, hardware)},
    }
    drawn: dict[str, SimResult] = {}
    notes: list[str] = []
    steps = steps_of(data, kind)
    for step in steps[:timelines]:
        try:
            with readable(kind):
                job = _job(step, known)
            drawn[step.label] = simulate(*job, timeline=True)
        except MopError as error:
            notes.append(f"No timeline of {step.label}: {error}")
    io.write_text(Path(out), html(explorer(data, kind, steps, drawn, notes)))
    return notes


def read_result(path: Path) -> dict[str, Any]:
    """The JSON of a command. Raises MopError."""
    data = parse_json(io.read_text(path, "result"), f"result: {path}")
    if not isinstance(data, dict):
        raise MopError(f"result: {path}: must be a mapping of keys, got {type(data).__name__}")
    return data


def _plain(result: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a result. Raises MopError for one that no result has."""
    data = dict(result)
    if problem := first_unreadable(data, "result"):
        raise MopError(f"{problem[0]}: {problem[1]}")
    return data


def _job(
    step: ExplorerStep, known: Mapping[str, Mapping[str, Any]]
) -> tuple[ModelSpec, HardwareProfile, int, Strategy, TrainSpec, Stack]:
    """What simulates the same step once more. Raises MopError where it would be another."""
    made = step.found.get("provenance") or {}
    found: dict[str, Any] = {}
    loaders: dict[str, Callable[[str], Any]] = {
        "model": read_model,
        "profile": read_hardware,
        "stack": lambda name: load_stack(name).on_kind(found["profile"].device_kind),
    }
    for noun, load in loaders.items():
        name, digest = made.get(noun), made.get(f"{noun}_digest")
        if not (isinstance(name, str) and isinstance(digest, str)):
            raise MopError(f"the result does not say its {noun}")
        one = known.get(noun, {}).get(digest)
        with suppress(MopError):  # where nothing is known by this name: a file's noun has one of its own
            one = one or load(name)
        if one is None or io.digest(one) != digest:
            option = {"model": "--model", "profile": "--hardware"}.get(noun, "")
            hint = f"; give its file by {option}" if option else ""
            what = "is neither shipped nor given" if one is None else "differs from the shipped one"
            raise MopError(f"the result's {noun} {name} (digest {digest}) {what}{hint}")
        found[noun] = one
    strategy = io.convert(step.found["strategy"], Strategy, "strategy")
    training = io.convert(step.found["training"], TrainSpec, "training")
    machine = found["profile"]
    nodes, rest = divmod(strategy.world_size, machine.devices_per_node)
    if rest:
        raise MopError(f"{strategy.world_size} ranks are not whole nodes of {machine.name}")
    return found["model"], machine, nodes, strategy, training, found["stack"]
