"""What the API returns: the keys of the command's JSON, pandas frames of the numbers, a notebook's display.

SI units throughout: seconds, bytes, FLOP/s. pandas is imported by the methods that make frames.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopsim.api.inputs import Inputs, make_plan
from mopsim.common import io
from mopsim.common.arguments import named
from mopsim.common.errors import SpecError
from mopsim.common.units import format_bytes, format_seconds
from mopsim.engine import SimResult
from mopsim.export import gaps_of
from mopsim.graph.counts import counts
from mopsim.report import tables
from mopsim.search import Options, SearchResult
from mopsim.search.miss import would_fit
from mopsim.search.problem import Problem
from mopsim.search.result import plan_json
from mopsim.search.why import why
from mopsim.spec.capability import Job, written
from mopsim.spec.plan import Plan
from mopsim.spec.strategy import Strategy
from mopsim.validate.sealed import seal

if TYPE_CHECKING:
    from pandas import DataFrame


class Result(Mapping[str, Any]):
    """A mapping of the keys that the command's `--json` has; each is an attribute too.

    `frame()` holds the numbers in SI units, `table()` the same as the command prints them.
    """

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Plain values under the keys of the command's JSON."""

    @abstractmethod
    def headline(self) -> str:
        """What was found, in a line."""

    @abstractmethod
    def _results(self) -> Sequence[SimResult]:
        """The simulated strategies, a row of the frames each."""

    inputs: Inputs

    @property
    def _level(self) -> float:
        """Probability of the intervals, as it was asked for."""
        return self.inputs.interval

    def frame(self) -> "DataFrame":
        """A row for each strategy: seconds, bytes, tokens per second."""
        return framed([_numbers(result, self._level) for result in self._results()])

    def table(self) -> "DataFrame":
        """A row for each strategy, as text for people: those of mopsim.report.tables.columns()."""
        level, results = self._level, self._results()
        heads = tables.columns(level, (one.each for one in results))
        return framed([tables.row(one, level) for one in results], list(heads))

    @cached_property
    def _json(self) -> dict[str, Any]:
        return self.to_json()

    def __getitem__(self, key: str) -> Any:
        return self._json[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._json)

    def __len__(self) -> int:
        return len(self._json)

    def __getattr__(self, name: str) -> Any:
        if hasattr(type(self), name):  # its own code met an AttributeError: that one is told
            return object.__getattribute__(self, name)
        if not name.startswith("_"):
            for keys in self._mappings():
                if name in keys:
                    return keys[name]
        raise AttributeError(f"{type(self).__name__} has no {name!r}; its keys are {', '.join(self)}")

    def _mappings(self) -> Iterator[Mapping[str, Any]]:
        """Where the keys are looked for, what is known at once first."""
        yield self._json

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._json})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.headline()})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the headline above the table."""
        said = escape(self.headline()).replace("\n", "<br>")
        return f"<p><b>{said}</b></p>{self.table().to_html(index=False)}"


def framed(rows: Sequence[Any], columns: list[str] | None = None) -> "DataFrame":
    from pandas import DataFrame

    return DataFrame(rows, columns=columns)


def _numbers(result: SimResult, level: float) -> dict[str, Any]:
    (fast, slow), (least, most) = result.step_time_interval(level), result.peak_memory_interval(level)
    return {
        "strategy": result.line,
        "stack": result.stack.name,
        "step_time_s": result.step_time,
        "step_time_low_s": fast,
        "step_time_high_s": slow,
        "tokens_per_s": result.tokens_per_second,
        "tokens_per_s_per_device": result.tokens_per_second_per_device,
        "mfu": result.mfu,
        "exposed_s": sum(result.exposed.values()),
        "verdict": result.verdict,
        "peak_memory_bytes": result.peak_memory,
        "peak_memory_low_bytes": least,
        "peak_memory_high_bytes": most,
        "p_fits": result.p_fits,
        "p_fits_as_described": result.p_as_described,
        "memory_limit_bytes": result.memory_limit,
        "host_memory_bytes": result.host_memory,
        "host_limit_bytes": result.host_limit,
    }


class Simulation(Result):
    """One optimizer step of one strategy. `result` has more than the keys: mopsim.engine.SimResult."""

    step_time_s: float
    tokens_per_s: float
    tokens_per_s_per_device: float
    each: str
    model_flops_per_s_per_device: float
    mfu: float
    fits: bool
    p_fits: float
    p_fits_as_described: float
    verdict: str
    step_time_interval_s: list[float]
    peak_memory_interval_bytes: list[float]
    step_time_corrected_s: float | None
    peak_memory_corrected_bytes: float | None
    peak_memory_bytes: int
    peak_memory_upper_bytes: int
    memory_limit_bytes: int
    host_memory_bytes: int
    memory_by_category_bytes: dict[str, int]
    time_by_component_s: dict[str, float]
    exposed_s: dict[str, float]
    peak_at: dict[str, Any]

    def __init__(
        self, inputs: Inputs, result: SimResult, notes: Sequence[str] = (), found: SearchResult | None = None
    ) -> None:
        """found: the search whose best this is, where a family was named."""
        self.inputs, self.result, self.notes, self.found = inputs, result, list(notes), found

    @property
    def strategy(self) -> Strategy:
        """The simulated strategy, all degrees filled in."""
        return self.result.strategy

    def to_json(self) -> dict[str, Any]:
        parameters = counts(self.inputs.model).to_json()
        plan = plan_json(self.result, self.inputs.model, self.inputs.interval)
        keys = {**plan, "parameters": parameters, "notes": self.notes}
        if self.found is None:
            return keys
        found, risky = self.found, self.found.at_risk
        faster = plan_json(risky, self.inputs.model, self.inputs.interval) if risky else None
        open_ = {"proven": found.proven, "gap": found.gap, "expected_gap": found.expected_gap}
        return keys | open_ | {"at_risk": faster}

    def headline(self) -> str:
        r = self.result
        said = (
            f"{r.line} on {r.stack.name}: {format_seconds(r.step_time)} a step, "
            f"{r.speed}, {format_bytes(r.peak_memory)} of "
            f"{format_bytes(r.memory_limit)}, {r.odds}"
        )
        return "; ".join(filter(None, (said, self.inputs.part_of([r]))))

    def _results(self) -> Sequence[SimResult]:
        return [self.result]

    def memory(self) -> "DataFrame":
        """Device memory by category, bytes: at the step's peak, and each category's own highest."""
        at_peak = self.result.memory_by_category
        rows = [(name, at_peak.get(name, 0), most) for name, most in self.result.highest_by_category.items()]
        found = framed(rows, ["category", "at_peak_bytes", "highest_bytes"])
        return found.sort_values("at_peak_bytes", ascending=False, ignore_index=True)

    def time(self) -> "DataFrame":
        """Where the step goes, seconds by component and `waiting` (they add up to the step)."""
        step, parts = self.result.step_time, self.result.time_by_component
        found = framed(
            [(name, part, part / step) for name, part in parts.items()], ["component", "seconds", "share"]
        )
        return found.sort_values("seconds", ascending=False, ignore_index=True)

    @cached_property
    def gaps(self) -> dict[str, list[SpecError]]:
        """What each target of `mopsim export` cannot express of it, by name; empty where it writes all."""
        i, one = self.inputs, self.result
        return gaps_of(Job(i.model, one.strategy, i.training, one.stack, i.hardware))

    def plan(self) -> Plan:
        """The plan that `mopexec train` runs, with what is predicted of it."""
        return make_plan(self.inputs, self.result)

    @named
    def save_plan(self, path: str | Path) -> None:
        """Write the plan as YAML. Raises MopError where it cannot be written."""
        io.write_yaml(Path(path), written(self.plan()))

    @named
    def seal(self, path: str | Path) -> str:
        """Write the prediction, its intervals and all that it was made from before the run, under a hash,
        which is returned; `mopsim validate --sealed` scores it. Raises MopError where it can't be written."""
        i = self.inputs
        return seal(Path(path), self.plan(), i.hardware, self.result, i.interval)

    @named
    def save_trace(self, path: str | Path, job: Mapping[str, Any] | None = None) -> None:
        """Simulate once more with its timeline, and write it for Perfetto or chrome://tracing (JSON)."""
        from mopsim.report.trace import chrome_trace

        facts = {**self.result.provenance, "job": dict(job or {})}
        io.write_text(Path(path), io.as_json(chrome_trace(self.timeline(), facts)))

    def timeline(self) -> SimResult:
        """The same step with its spans and memory curve."""
        return self.inputs.simulate(self.result.strategy, self.result.stack, timeline=True)


class Ranking(Result):
    """The strategies that a search found: those that are sure to fit, fastest first; where none is, the
    likeliest first. `found` has all that the search counted."""

    candidates: int
    bounded: int
    simulated: int
    rejected: dict[str, int]
    left_out: list[str]
    seconds: float
    proven: bool
    gap: float | None
    best_by_family: dict[str, dict[str, Any] | None]
    lacking: dict[str, dict[str, Any]]
    verdict: str

    def __init__(self, inputs: Inputs, problem: Problem, options: Options, found: SearchResult) -> None:
        self.inputs, self.problem, self.options, self.found = inputs, problem, options, found

    @property
    def top(self) -> list[Simulation]:
        """Those ranked; empty where nothing fits."""
        return [Simulation(self.inputs, one) for one in self.found.top]

    @property
    def best(self) -> Simulation | None:
        """The first, or None where nothing fits (`closest` is what misses by least)."""
        return Simulation(self.inputs, self.found.best) if self.found.best else None

    @property
    def closest(self) -> Simulation | None:
        """Where nothing fits: the strategy that misses by least."""
        one = self.found.closest
        return Simulation(self.inputs, one) if one and not self.found.top else None

    @cached_property
    def why(self) -> list[str]:
        """What bounds the step, what each restriction costs, what would change the answer, and the rivals;
        where nothing fits, what would. A line each; simulates some plans on other hardware, or searches."""
        return self.explain(lambda simulated, said: None)

    def explain(self, progress: Callable[[int, str], None]) -> list[str]:
        """`why`. progress: where nothing fits, called as progress(simulated so far, the change tried)."""
        known: list[str] | None = self.__dict__.get("why")
        if known is None:
            known = self.__dict__["why"] = (
                why(self.found, self.problem)
                if self.found.best
                else would_fit(self.found, self.problem, self.options, progress)
            )
        return known

    def to_json(self) -> dict[str, Any]:
        """`stack`: that of all families by name, null where each has its own."""
        return {**self._plain, "why": self.why}

    @cached_property
    def _plain(self) -> dict[str, Any]:
        """The keys that are known without `why`."""
        stack, parameters = self.inputs.stack, counts(self.inputs.model).to_json()
        return {
            **self.found.to_json(self.inputs.interval),
            "stack": stack.name if stack else None,
            "parameters": parameters,
        }

    def _mappings(self) -> Iterator[Mapping[str, Any]]:
        yield self._plain
        yield self._json

    def headline(self) -> str:
        found = self.found
        return f"{found.verdict()}; {found.exhausted()}" if found.best else found.verdict()

    def _results(self) -> Sequence[SimResult]:
        closest = self.closest
        return self.found.top or ([closest.result] if closest else [])
