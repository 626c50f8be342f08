"""mopsim.compare: several strategies side by side, and over a sweep."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mopsim.api.inputs import (
    AnyHardware,
    AnyModel,
    AnyStack,
    AnyStrategy,
    Count,
    Inputs,
    Resolved,
    count,
    facts,
    is_family,
    notes,
    read_inputs,
    resolve,
)
from mopsim.api.results import Result, Simulation
from mopsim.api.strategies import StrategyTemplate
from mopsim.common.errors import MopError
from mopsim.common.outputs import whole_directory
from mopsim.engine import SimResult
from mopsim.report.compare import Sweep, difference, finding, summary
from mopsim.search.result import plan_json
from mopsim.spec.plan import Plan
from mopsim.spec.strategy import MatmulDType, Strategy

if TYPE_CHECKING:
    from pandas import DataFrame

Setting = Literal["seq_len", "nodes"]


class Comparison(Result):
    """Strategies side by side. `sweep` has their throughput over a setting, if one was asked for."""

    strategies: dict[str, dict[str, Any]]
    finding: str
    difference: str

    def __init__(
        self, inputs: Inputs, resolved: Mapping[str, Resolved], sweep: Sweep | None, notes: Sequence[str]
    ) -> None:
        self.inputs, self.sweep, self.notes = inputs, sweep, list(notes)
        self.results = {label: one.result for label, one in resolved.items()}
        self.gaps = {label: one.found.gap for label, one in resolved.items() if one.found}

    @property
    def simulations(self) -> dict[str, Simulation]:
        """By label."""
        return {label: Simulation(self.inputs, result) for label, result in self.results.items()}

    def to_json(self) -> dict[str, Any]:
        labels, results = list(self.results), list(self.results.values())
        found: dict[str, Any] = {
            "strategies": {label: self._strategy(label) for label in labels},
            "stack": self.inputs.stack.name if self.inputs.stack else None,
            "finding": finding(results, labels, self.gaps),
            "proven": all(gap == 0 for gap in self.gaps.values()),
            "difference": difference(results, labels),
            "facts": facts(self.inputs, "mopsim.compare"),
        }
        if self.sweep:
            found["sweep"] = {
                "setting": self.sweep.setting,
                "values": list(self.sweep.values),
                "results": {
                    label: [one.to_json() if one else None for one in points]
                    for label, points in self.sweep.results.items()
                },
            }
        return found

    def headline(self) -> str:
        return summary(list(self.results.values()), list(self.results), self.gaps)

    def _strategy(self, label: str) -> dict[str, Any]:
        """The keys of one strategy; of a family's best, whether its search was exhausted."""
        found = plan_json(self.results[label], self.inputs.model)
        if label in self.gaps:
            found |= {"proven": self.gaps[label] == 0, "gap": self.gaps[label]}
        return found

    def _results(self) -> Sequence[SimResult]:
        return list(self.results.values())

    def sweep_frame(self) -> "DataFrame":
        """Tokens/s of a device by label over the sweep's values; NaN where a strategy does not fit or is not
        legal. Raises MopError where no sweep was asked for."""
        from pandas import DataFrame, Index

        if self.sweep is None:
            raise MopError("sweep: was not asked for")
        columns = {
            label: [one.tokens_per_second_per_device if one and one.fits else float("nan") for one in points]
            for label, points in self.sweep.results.items()
        }
        return DataFrame(columns, index=Index(self.sweep.values, name=self.sweep.setting))

    def write(self, folder: str | Path, command: str = "mopsim.compare") -> list[Path]:
        """Write the report (index.md, index.html, figures) into `folder`, all of it or nothing; returns the
        files."""
        from mopsim.report.compare import write_compare

        inputs = self.inputs
        cluster = inputs.hardware.cluster(inputs.nodes)
        title = f"{inputs.model.name} at {inputs.training.seq_len} tokens on {cluster}"
        timelines = [simulation.timeline() for simulation in self.simulations.values()]
        with whole_directory(Path(folder)) as aside:
            written = write_compare(
                aside, list(self.results.values()), list(self.results), timelines, self.sweep, title,
                facts(inputs, command), self.gaps,
            )  # fmt: skip
        return [Path(folder) / path.relative_to(aside) for path in written]


def compare(
    model: AnyModel,
    hardware: AnyHardware,
    *,
    strategies: Sequence[AnyStrategy] | Mapping[str, AnyStrategy],
    seq_len: Count,
    global_batch: int,
    nodes: int = 1,
    sweep: tuple[Setting, Sequence[Count]] | None = None,
    runnable: bool = False,
    budget: int = 60,
    routing: str | Sequence[float] = "balanced",
    precision: MatmulDType = "bfloat16",
    learning_rate: float = 3e-4,
    warmup_steps: int = 0,
    seed: int = 0,
    stack: AnyStack | None = None,
) -> Comparison:
    """Simulate several strategies side by side.

    strategies: as for mopsim.simulate, in a sequence, or by the label that they are to have. sweep:
    ("seq_len", ["32K", "64K"]) or ("nodes", [1, 2, 4]), where each strategy is simulated too. runnable,
    budget: for the families among them, whose best strategy is searched at each point: only what mopexec
    runs; simulations at most. The rest as for mopsim.simulate. Raises MopError.
    """
    inputs = read_inputs(
        model, hardware, nodes=nodes, seq_len=seq_len, global_batch=global_batch, routing=routing,
        precision=precision, learning_rate=learning_rate, warmup_steps=warmup_steps, seed=seed, stack=stack,
    )  # fmt: skip
    named = dict(strategies) if isinstance(strategies, Mapping) else _labelled(strategies)
    if not named:
        raise MopError("strategies: none is given, nothing to compare")
    options: dict[str, Any] = {"runnable": runnable, "budget": budget}
    points = read_sweep(*sweep) if sweep else None
    resolved = {label: resolve(one, inputs, **options) for label, one in named.items()}
    swept = _sweep(inputs, named, *points, options) if points else None
    return Comparison(inputs, resolved, swept, notes(list(named.values()), inputs))


def _labelled(strategies: Sequence[AnyStrategy]) -> dict[str, AnyStrategy]:
    """A short distinct label for each: the family, the strategy's name, or the file's stem."""
    names = [_label(one) for one in strategies]
    if len(set(names)) < len(names):
        names = [f"{name} {index + 1}" for index, name in enumerate(names)]
    return dict(zip(names, strategies, strict=True))


def _label(given: AnyStrategy) -> str:
    if isinstance(given, StrategyTemplate):
        return str(given.given.get("name", given.family))
    if isinstance(given, Strategy | Plan):
        return given.name if isinstance(given, Strategy) else given.strategy.name
    return str(given) if is_family(given) else Path(given).stem


def read_sweep(setting: str, values: Sequence[Count]) -> tuple[str, list[int], list[str]]:
    """(setting, ascending values, as they were written). Raises MopError."""
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


def _sweep(
    inputs: Inputs,
    named: Mapping[str, AnyStrategy],
    setting: str,
    values: Sequence[int],
    names: Sequence[str],
    options: dict[str, Any],
) -> Sweep:
    results: dict[str, list[SimResult | None]] = {label: [] for label in named}
    for value in values:
        point = _at(inputs, setting, value)
        for label, one in named.items():
            results[label].append(_point(one, point, options))
    return Sweep(setting.replace("_", "-"), values, names, results)


def _at(inputs: Inputs, setting: str, value: int) -> Inputs:
    """The job at one value of the sweep. Raises MopError."""
    from msgspec.structs import replace as changed

    if setting == "nodes":
        return replace(inputs, nodes=value)
    training = changed(inputs.training, seq_len=value)
    training.check_model(inputs.model)
    return replace(inputs, training=training)


def _point(given: AnyStrategy, inputs: Inputs, options: dict[str, Any]) -> SimResult | None:
    """A result, or None where the strategy is not legal at this point."""
    try:
        return resolve(given, inputs, **options).result
    except MopError:
        return None
