"""A comparison over the values of one setting: what is held constant meanwhile, and the job at each value."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from msgspec.structs import replace as changed

from mopsim.api.inputs import Count, Inputs, count
from mopsim.api.results import Simulation
from mopsim.common.errors import MopError
from mopsim.report.sweep import Sweep, SweepPoint

Setting = Literal["seq_len", "nodes"]
Hold = Literal["tokens_per_step", "sequences_per_step", "tokens_per_device"]
"""What a sweep holds constant."""

_SEQUENCES: dict[str, Callable[[Inputs, int, int], float]] = {
    "tokens_per_step": lambda at, length, nodes: at.training.global_batch * at.training.seq_len / length,
    "sequences_per_step": lambda at, length, nodes: at.training.global_batch,
    "tokens_per_device": lambda at, length, nodes: (
        at.training.global_batch * at.training.seq_len / length * nodes / at.nodes
    ),
}
"""Sequences of a step, of the job, at a sequence length and a number of nodes."""


@dataclass(frozen=True)
class Swept(Sweep):
    """A sweep with its simulations: of each value, by label."""

    simulations: Sequence[Mapping[str, Simulation]] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "setting": self.setting,
            "hold": self.hold.replace(" ", "_"),
            "values": self.values,
            "global_batch": [point.batch for point in self.points],
            "results": {
                label: [found[label].to_json() if label in found else None for found in self.simulations]
                for label in self.labels
            },
            "refused": {label: [point.refused.get(label) for point in self.points] for label in self.labels},
        }


def sweep(
    inputs: Inputs,
    labels: Sequence[str],
    play: Callable[[str, Inputs], Simulation],
    asked: tuple[str, Sequence[Count]],
    hold: Hold,
) -> Swept:
    """Play every label at every value. Raises MopError for a value that cannot be."""
    setting, values, names = read_sweep(*asked, hold)
    points, simulations = [], []
    for value, name in zip(values, names, strict=True):
        job = _at(inputs, setting, value, hold)
        found: dict[str, Simulation] = {}
        refused: dict[str, str] = {}
        for label in labels:
            try:
                found[label] = play(label, job)
            except MopError as error:  # not legal at this point
                refused[label] = str(error)
        results = {label: found[label].result if label in found else None for label in labels}
        of = job.training
        points.append(SweepPoint(value, name, results, refused, of.global_batch, of.seq_len, job.world_size))
        simulations.append(found)
    return Swept(setting.replace("_", "-"), points, hold.replace("_", " "), simulations)


def read_sweep(
    setting: str, values: Sequence[Count], hold: str = "tokens_per_step"
) -> tuple[str, list[int], list[str]]:
    """(setting, ascending values, as they were written). Raises MopError."""
    if hold not in get_args(Hold):
        raise MopError(f"hold: {hold!r} is not one of {', '.join(get_args(Hold))}")
    if setting not in get_args(Setting):
        raise MopError(f"sweep: {setting!r} is not {' or '.join(get_args(Setting))}")
    read: dict[int, str] = {}
    for value in values:
        number = count(value, "sweep")
        if setting == "nodes" and number > 2**16:
            raise MopError(f"sweep: nodes {str(value)!r} must be at most 65536")
        if number in read:
            raise MopError(f"sweep: {setting} {str(value)!r} is given twice (as {read[number]!r})")
        read[number] = str(value)
    if not read:
        raise MopError(f"sweep: {setting} has no values")
    return setting, sorted(read), [read[number] for number in sorted(read)]


def _at(inputs: Inputs, setting: str, value: int, hold: Hold) -> Inputs:
    """The job at one value; its batch is the nearest to what is held, at least one sequence. Raises
    MopError."""
    length = value if setting == "seq_len" else inputs.training.seq_len
    nodes = value if setting == "nodes" else inputs.nodes
    batch = max(1, round(_SEQUENCES[hold](inputs, length, nodes)))
    training = changed(inputs.training.at_length(length), global_batch=batch)
    training.check_model(inputs.model)
    return replace(inputs, nodes=nodes, training=training)
