"""A comparison over the values of one setting: what is held constant meanwhile, and the job at each value."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import gcd, lcm
from typing import Any, Literal, get_args

from msgspec.structs import replace as changed

from mopsim.api.inputs import AnyStrategy, Count, Inputs, count, is_family, strategy_of
from mopsim.api.results import Simulation
from mopsim.common.errors import MopError
from mopsim.report.sweep import Sweep, SweepPoint
from mopsim.size.counts import global_batch

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
            "held_batch": [point.held for point in self.points],
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
    given: Sequence[AnyStrategy] = (),
) -> Swept:
    """Play every label at every value. given: the strategies. Raises MopError for a value that cannot be."""
    setting, values, names = read_sweep(*asked, hold)
    points, simulations = [], []
    for value, name in zip(values, names, strict=True):
        job, held = _at(inputs, setting, value, hold, given)
        found, refused = play_each(labels, job, play, MopError)
        results = {label: found[label].result if label in found else None for label in labels}
        of = job.training
        points.append(
            SweepPoint(value, name, results, refused, of.global_batch, of.seq_len, job.world_size, held)
        )
        simulations.append(found)
    return Swept(setting.replace("_", "-"), points, hold.replace("_", " "), simulations)


def play_each(
    labels: Iterable[str], job: Inputs, play: Callable[[str, Inputs], Simulation], refusal: type[MopError]
) -> tuple[dict[str, Simulation], dict[str, str]]:
    """(simulations, why there is none) by label. refusal: what is no error but a label's own."""
    found, refused = dict[str, Simulation](), dict[str, str]()
    for label in labels:
        try:
            found[label] = play(label, job)
        except refusal as error:
            refused[label] = str(error)
    return found, refused


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


def _at(
    inputs: Inputs, setting: str, value: int, hold: Hold, given: Sequence[AnyStrategy]
) -> tuple[Inputs, float]:
    """(the job at one value, sequences of a step by what is held). Raises MopError."""
    length = value if setting == "seq_len" else inputs.training.seq_len
    nodes = value if setting == "nodes" else inputs.nodes
    at, held = replace(inputs, nodes=nodes), _SEQUENCES[hold](inputs, length, nodes)
    least = _least(given, at, held)
    whole = held % least == 0 and _divides(inputs, at, held)
    batch = int(held) if whole else global_batch(at.world_size, held, least)
    training = changed(inputs.training.at_length(length), global_batch=batch)
    training.check_model(inputs.model)
    return replace(at, training=training), held


def _divides(inputs: Inputs, at: Inputs, held: float) -> bool:
    """Whether what is held is whole sequences, each shared by the ranks of a node at most, or by as many as
    share one of the job's."""
    if held != int(held) or held < 1:
        return False
    own, here = (
        job.world_size // gcd(job.world_size, batch)
        for job, batch in ((inputs, inputs.training.global_batch), (at, int(held)))
    )
    return here <= max(own, inputs.hardware.devices_per_node)


def _least(given: Sequence[AnyStrategy], at: Inputs, held: float) -> int:
    """Sequences that every strategy with its degrees makes whole microbatches of, if what is held has as
    many; else 1."""
    least = 1
    for one in given:
        if not is_family(one):
            with suppress(MopError):  # not legal at this point
                strategy, _ = strategy_of(one, at)
                least = lcm(least, strategy.micro_batch * strategy.data_groups)
    return least if least <= held else 1
