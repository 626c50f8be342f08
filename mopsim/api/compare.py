"""mopsim.compare: several strategies side by side, and over a sweep."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopsim.api.idle import idle
from mopsim.api.inputs import (
    AnyHardware,
    AnyModel,
    AnyStack,
    AnyStrategy,
    Count,
    Inputs,
    NoStrategyError,
    facts,
    is_family,
    notes,
    read_inputs,
)
from mopsim.api.on_stacks import for_all, with_one_attention
from mopsim.api.results import Result, Simulation
from mopsim.api.run import played
from mopsim.api.strategies import StrategyTemplate
from mopsim.api.sweep import Hold, Setting, Swept, play_each, read_sweep
from mopsim.api.sweep import sweep as swept
from mopsim.common.arguments import named
from mopsim.common.errors import MopError, require, require_name
from mopsim.common.outputs import whole_directory
from mopsim.common.units import format_nodes
from mopsim.common.values import require_once
from mopsim.engine import SimResult
from mopsim.report.findings import difference, finding, lead, software, verdict
from mopsim.report.sweep import over
from mopsim.search.result import exhausted
from mopsim.spec.documents import held
from mopsim.spec.plan import Plan
from mopsim.spec.strategy import MatmulDType, Strategy
from mopsim.spec.training import TrainSpec

if TYPE_CHECKING:
    from pandas import DataFrame


Progress = Callable[[int, int, str], None]


@dataclass
class Told:
    """What is told of a comparison's progress. total: simulations, or searches of a family, in all."""

    progress: Progress | None
    total: int
    done: int = 0

    @contextmanager
    def of(self, label: str, at: Inputs) -> Iterator[Callable[[int, SimResult | None], None]]:
        """While a label is played on a job; of a family, to be told each simulation and the best so far."""
        what = f"{label} on {format_nodes(at.nodes)}, sequences of {at.training.seq_len:,}"

        def tell(simulated: int = 0, best: SimResult | None = None) -> None:
            if self.progress:
                self.progress(self.done, self.total, f"{what}, {simulated} simulated" if simulated else what)

        tell()
        try:
            yield tell
        finally:
            self.done += 1
            tell()


class Comparison(Result):
    """Strategies side by side. `sweep` has their throughput over a setting, if one was asked for. `refused`:
    by label, why a family has no strategy; it is not among the results."""

    strategies: dict[str, dict[str, Any]]
    finding: str
    software: str
    difference: str
    refused: dict[str, str]

    def __init__(
        self,
        inputs: Inputs,
        simulations: Mapping[str, Simulation],
        sweep: Swept | None,
        notes: Sequence[str],
        refused: Mapping[str, str],
        stacks: Sequence[str] = (),
    ) -> None:
        """stacks: shipped ones that have something of every strategy, where those found are on several."""
        self.inputs, self.simulations, self.sweep = inputs, dict(simulations), sweep
        self.notes, self.refused = list(notes), dict(refused)
        self.results = {label: one.result for label, one in simulations.items()}
        self.stacks, self.alike = list(stacks), with_one_attention(inputs, self.results)
        found = {label: one.found for label, one in simulations.items() if one.found}
        self.searched = {label: one.left for label, one in found.items()}
        self.at_risk = {label: one.at_risk for label, one in found.items() if one.at_risk}

    def to_json(self, command: str = "mopsim.compare") -> dict[str, Any]:
        """command: what made it."""
        said = self._placed(finding(self.results, self.searched, self.inputs.interval, self.at_risk))
        found: dict[str, Any] = {
            "strategies": {label: one.to_json() for label, one in self.simulations.items()},
            "stack": self.inputs.stack.name if self.inputs.stack else None,
            "finding": ". ".join(said),
            "findings": said,
            "lead": self._lead(),
            "software": software(self.results, self.stacks, self.alike),
            "proven": all(exhausted(gap) for gap, _ in self.searched.values()),
            "difference": difference(self.results),
            "refused": self.refused,
            "facts": facts(self.inputs, command),
        }
        return found | ({"sweep": self.sweep.to_json()} if self.sweep else {})

    @property
    def any_fits(self) -> bool:
        """Whether one fits, here or at a value of the sweep."""
        swept = self.sweep.every if self.sweep else []
        return any(one.fits for one in [*self.results.values(), *swept])

    def _lead(self) -> dict[str, Any] | None:
        """Of the winner over the next that fits: the ratio of their speeds, where the measured one lies, and
        the probability that the winner is the faster one."""
        found = lead(self.results)
        if found is None:
            return None
        over, times, ratio = found
        low, high = ratio.interval(self.inputs.interval)
        return {"over": over, "ratio": times, "interval": [low, high], "p_faster": ratio.p_faster}

    def headline(self) -> str:
        """A line for each thing that was found."""
        inputs = self.inputs
        said = verdict(self.results, self.searched, inputs.interval, self.stacks, self.alike, self.at_risk)
        without = (f"{label} has no strategy here" for label in self.refused)
        return "\n".join(f"{one}." for one in (*self._placed(said), *without))

    def _placed(self, said: list[str]) -> list[str]:
        """What is said of the job; of a sweep first who is fastest at each value, then where the job is."""
        if self.sweep is None:
            return said
        nodes, length = self.inputs.nodes, self.inputs.training.seq_len
        node = f"{nodes:,} node{'s' if nodes > 1 else ''}"
        here = node if self.sweep.setting == "nodes" else f"{length:,} tokens"
        return [over(self.sweep), f"At {here}: {said[0]}", *said[1:]]

    def _results(self) -> Sequence[SimResult]:
        return list(self.results.values())

    def sweep_frame(self) -> "DataFrame":
        """Tokens/s of a GPU by label over the sweep's values; NaN where a strategy does not fit or is not
        legal. Raises MopError where no sweep was asked for."""
        from pandas import DataFrame, Index

        if self.sweep is None:
            raise MopError("sweep: was not asked for")
        return DataFrame(self.sweep.rates(), index=Index(self.sweep.values, name=self.sweep.setting))

    def _swept_on(self) -> str:
        """Network and machine at every value of the sweep."""
        inputs = self.inputs
        if self.sweep and self.sweep.setting == "nodes":
            return f"{inputs.model.name} at {inputs.training.seq_len:,} tokens on {inputs.hardware.name}"
        return f"{inputs.model.name} on {inputs.hardware.cluster(inputs.nodes)}"

    @named
    def write(
        self, folder: str | Path, command: str = "mopsim.compare", formats: Sequence[str] = ("png",)
    ) -> list[Path]:
        """Write the report (index.md, index.html, figures) into `folder`, all of it or nothing; returns the
        files. formats: of the figures, of png, svg and pdf; the page shows PNGs, which are always written."""
        from mopsim.report.compare import write_compare
        from mopsim.report.formats import saved_as

        inputs = self.inputs
        title = inputs.where_of(self._results())
        timelines = [simulation.timeline() for simulation in self.simulations.values()]
        with whole_directory(Path(folder)) as aside, saved_as(formats):
            write_compare(
                aside, self.results, timelines, self.sweep, title, facts(inputs, command), self.headline(),
                inputs.interval, self._swept_on(), self.refused,
            )  # fmt: skip
            written = [path.name for path in aside.iterdir()]
        return [Path(folder) / name for name in sorted(written)]


@named
def compare(
    model: AnyModel,
    hardware: AnyHardware,
    *,
    strategies: Sequence[AnyStrategy] | Mapping[str, AnyStrategy],
    seq_len: Count,
    global_batch: int,
    nodes: int = 1,
    sweep: tuple[Setting, Sequence[Count]] | None = None,
    hold: Hold = "tokens_per_step",
    runnable: bool = False,
    budget: int = 100,
    routing: str | Sequence[float] = "balanced",
    document_tokens: Count | None = None,
    precision: MatmulDType | None = None,
    learning_rate: float | None = None,
    warmup_steps: int | None = None,
    seed: int | None = None,
    stack: AnyStack | None = None,
    interval: float = 0.9,
    progress: Progress | None = None,
) -> Comparison:
    """Simulate several strategies side by side.

    strategies: as for mopsim.simulate, in a sequence, or by label. sweep: ("seq_len", ["32K", "64K"]) or
    ("nodes", [1, 2, 4]): each strategy is simulated there too. hold: what the sweep holds constant; the
    global batch follows, near it where that divides over no data groups. runnable: search families only among
    plans that mopexec runs. budget: most simulations of such a search. progress: called as progress(done, of
    how many, what is being done). The rest as for mopsim.simulate. A family without a strategy is in
    `refused`, unless none is left. Raises MopError."""
    named = dict(strategies) if isinstance(strategies, Mapping) else _labelled(strategies)
    inputs = read_inputs(
        model, hardware, nodes=nodes, seq_len=seq_len, global_batch=global_batch, routing=routing,
        document_tokens=document_tokens, precision=precision, learning_rate=learning_rate,
        warmup_steps=warmup_steps, seed=seed, stack=stack, interval=interval, strategies=named.values(),
    )  # fmt: skip
    if not named:
        raise MopError("strategies: none is given, nothing to compare")
    for label in named:
        require_name(label, "strategies")
    require(budget >= 1, "budget", budget, "must be at least 1")  # also where no family is searched

    values = len(read_sweep(*sweep, hold)[1]) if sweep else 0  # refused before the work
    told = Told(progress, len(named) * (1 + values))

    def play(label: str, at: Inputs) -> Simulation:
        with told.of(label, at) as tell:
            return played(named[label], at, runnable=runnable, budget=budget, progress=tell)

    simulations, refused = play_each(named, inputs, play, NoStrategyError)
    if not simulations:
        raise NoStrategyError("; ".join(refused.values()))
    points = swept(inputs, list(named), play, sweep, hold, list(named.values())) if sweep else None
    on = list(dict.fromkeys(one.result.stack.name for one in simulations.values()))
    stacks = for_all([named[label] for label in simulations], inputs, runnable, on) if on[1:] else []
    said = [*notes(list(named.values()), inputs), *_idle(simulations), *_trained(simulations)]
    said += _held(inputs, points)
    return Comparison(inputs, simulations, points, said, refused, stacks)


def _held(inputs: Inputs, points: Swept | None) -> list[str]:
    """How long the documents are at each sequence length of a sweep, where they are apart."""
    documents = inputs.training.document_tokens
    if not documents or points is None or points.setting == "nodes":
        return []
    return [f"note: {held(documents, points.values)}"]


def _idle(simulations: Mapping[str, Simulation]) -> list[str]:
    """What of each acts on nothing, once."""
    found = [idle(one.result.strategy, one.result.stack, one.inputs) for one in simulations.values()]
    return list(dict.fromkeys(chain.from_iterable(found)))


def _trained(simulations: Mapping[str, Simulation]) -> list[str]:
    """What of training is not the same for all: plans of different ones."""
    found = []
    for field in TrainSpec.__struct_fields__:
        labels: dict[Any, list[str]] = {}
        for label, one in simulations.items():
            labels.setdefault(getattr(one.inputs.training, field), []).append(label)
        if len(labels) > 1:
            each = (f"{value} ({', '.join(names)})" for value, names in labels.items())
            found.append(f"{field} {', '.join(each)}")
    return [f"note: the strategies are not compared on one training: {'; '.join(found)}"] if found else []


def _labelled(strategies: Sequence[AnyStrategy]) -> dict[str, AnyStrategy]:
    """A short distinct label for each: the family, the strategy's name, or the file's stem."""
    require_once([_same(one) for one in strategies], "strategies")
    names = [_label(one) for one in strategies]
    if len(set(names)) < len(names):
        names = [f"{name} {index + 1}" for index, name in enumerate(names)]
    return dict(zip(names, strategies, strict=True))


def _same(given: AnyStrategy) -> Any:
    """What two names of one strategy have in common: where its file lies."""
    if not isinstance(given, str | Path) or is_family(given):
        return given
    return os.path.relpath(os.path.realpath(given))


def _label(given: AnyStrategy) -> str:
    if isinstance(given, StrategyTemplate):
        return str(given.given.get("name", given.family))
    if isinstance(given, Strategy | Plan):
        return given.name if isinstance(given, Strategy) else given.strategy.name
    return str(given) if is_family(given) else Path(given).stem
