"""mopsim.size: which machine type, and how many nodes of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mopsim
from mopsim.api.inputs import (
    AnyHardware,
    AnyModel,
    AnyStack,
    Count,
    Inputs,
    count,
    read_documents,
    read_families,
    read_hardware,
    read_model,
    read_routing,
    read_stack,
)
from mopsim.api.results import Result, Simulation, framed
from mopsim.api.size_json import assumptions_json, brief_json, miss_json, point_json, rival_json, sizing_json
from mopsim.common import io
from mopsim.common.arguments import named
from mopsim.common.errors import MopError, require, shown
from mopsim.common.outputs import whole_directory
from mopsim.common.processes import pool
from mopsim.common.units import parse_dollars, parse_tokens
from mopsim.common.values import require_once
from mopsim.cost.compute import matmul_curve
from mopsim.engine import SimResult
from mopsim.intervals.spread import check_level
from mopsim.report.sizing import columns, row, summary
from mopsim.size import Goal, Point, Request, Sizing, Terms, assume, beside, size_all
from mopsim.size.assumptions import node_prices, read_sites, with_capex
from mopsim.size.decided import Decided
from mopsim.size.figures import DAY
from mopsim.size.points import DEFAULT_SIMULATIONS
from mopsim.size.settle import settle
from mopsim.size.whatif import Swing, what_if
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.strategy import MatmulDType

if TYPE_CHECKING:
    from pandas import DataFrame

Told = Callable[[int, int, str], None]


class Clusters(Result, Decided):
    """For each machine type the cluster that meets the limits, or the reason why there is none.

    `cheapest` and `fastest` (within max_cost) are chosen among all clusters that were tried and meet the
    limits. `chosen` is the recommended one: the cheapest; if only a budget was given, the fastest; if no
    price is known, the one with fewest devices. It is None if no cluster meets the limits, and `miss` is
    then the nearest. `pareto` has the clusters that no other beats in cost and time."""

    recommended: dict[str, Any] | None
    hardware: list[dict[str, Any]]

    @cached_property
    def best(self) -> Simulation | None:
        """The step of the recommended cluster, simulated once more with its timeline."""
        chosen = self.chosen
        if chosen is None or chosen.result is None:
            return None
        asked, plan = self.request, chosen.result
        inputs = Inputs(
            asked.model, chosen.hardware, chosen.num_nodes, chosen.training, asked.precision, asked.stack,
            interval=asked.interval,
        )  # fmt: skip
        return Simulation(inputs, inputs.simulate(plan.strategy, plan.stack))

    def what_if(self) -> list[Swing]:
        """Every input of the recommended cluster (or the nearest miss) moved to its low and its high value,
        alone; the largest change first. Simulates its plan with every kind of work faster and slower."""
        return what_if(self.request, self.subject, self.points) if self.subject else []

    @named
    def write(self, folder: str | Path, command: str = "mopsim.size") -> list[Path]:
        """Write decision.html, its figures (PNG, SVG), what_if.json and size.json into `folder`, all or
        nothing; returns the files. command: what made it."""
        from mopsim.report.decision import Decision, write_decision

        swings = self.what_if()
        settled = settle(self.subject, swings, self.request.interval) if self.subject else []
        profiles = [io.identified(one.hardware) for one in self.sizings]
        said = {"command": command, "version": mopsim.__version__, "hardware profiles": ", ".join(profiles)}
        with whole_directory(Path(folder)) as aside:
            write_decision(aside, Decision(self, swings, settled, said))
            io.write_json(str(aside / "what_if.json"), [asdict(one) for one in swings])
            io.write_json(str(aside / "size.json"), self.to_json())
            written = sorted(path.name for path in aside.iterdir())
        return [Path(folder) / name for name in written]

    def headline(self) -> str:
        return f"cheapest: {summary(self.cheapest)}; fastest: {summary(self.fastest)}"

    def _points(self) -> list[Point]:
        return [sizing.best for sizing in self.sizings if sizing.best]

    def _results(self) -> Sequence[SimResult]:
        return [point.result for point in self._points() if point.result]

    @property
    def _level(self) -> float:
        return self.request.interval

    def frame(self) -> "DataFrame":
        """A row for each machine type: seconds, dollars, joules, bytes; else NaN and the `reason`."""
        inner = ("result", "strategy", "network", "reliability", "cost_by_part_usd", "sites")
        rows = [
            ({} if one.best is None else point_json(one.best, self.request))
            | {"hardware": one.hardware.name, "reason": one.why}
            for one in self.sizings
        ]
        return framed([{name: one for name, one in row.items() if name not in inner} for row in rows])

    def tried(self) -> "DataFrame":
        """A row for each cluster that was tried."""
        machines = self["hardware"]
        return framed([{"hardware": one["name"]} | tried for one in machines for tried in one["tried"]])

    def table(self) -> "DataFrame":
        """A row for each machine type that can, as text for people."""
        rows = [row(point, self.request) for point in self._points()]
        return framed(rows, list(columns(self.request)))

    def to_json(self) -> dict[str, Any]:
        request, goal = self.request, self.request.goal
        least = self.chosen.figures.cost if self.chosen and self.chosen.figures else None
        return {
            "model": request.model.name,
            "tokens": goal.tokens,
            "deadline_s": goal.seconds,
            "budget_usd": goal.budget,
            "confidence": request.confidence,
            "seq_len": request.seq_len,
            "document_tokens": request.documents,
            "global_batch_tokens": request.batch_tokens,
            "paid": "bought" if request.terms.buy else "reserved" if request.terms.reserved else "on demand",
            "assumptions": assumptions_json(request.at(self.subject.figures if self.subject else None)),
            "families": list(request.families),
            "stack": request.stack.name if request.stack else None,
            "budget": request.simulations,
            "hardware": [sizing_json(sizing, request, least) for sizing in self.sizings],
            "recommended": point_json(self.chosen, request) if self.chosen else None,
            "ties": [brief_json(point, request) for point in self.ties],
            "near_tie": brief_json(self.near, request) if self.near else None,
            "undecided": [rival_json(one, request) for one in self.undecided],
            "surer": brief_json(self.surer, request) if self.surer else None,
            "surer_to_fit": brief_json(self.fitter, request) if self.fitter else None,
            "fastest": point_json(self.fastest, request) if self.fastest else None,
            "nearest_miss": miss_json(self.miss, request),
            "points": [brief_json(point, request) for point in self.points],
            "pareto": [brief_json(point, request) for point in self.front],
            "version": mopsim.__version__,
        }


@named
def size(
    model: AnyModel,
    hardware: AnyHardware | Sequence[AnyHardware],
    *,
    tokens: float | str,
    days: float | None = None,
    budget: float | str | None = None,
    seq_len: Count = 4096,
    global_batch_tokens: Count = "4M",
    families: str | Sequence[str] | None = None,
    runnable: bool = False,
    max_nodes: int | None = None,
    max_devices: int | None = None,
    confidence: float = 0.5,
    prices: Mapping[str, float] | None = None,
    reserved: bool = False,
    buy: bool = False,
    capex: Mapping[str, float] | None = None,
    sites: str | Path | None = None,
    assumptions: Mapping[str, float] | None = None,
    utilisation: float | None = None,
    max_cost: float | str | None = None,
    simulations: int = DEFAULT_SIMULATIONS,
    routing: str | Sequence[float] = "balanced",
    document_tokens: Count | None = None,
    precision: MatmulDType = "bfloat16",
    jobs: int = 1,
    stack: AnyStack | None = None,
    interval: float = 0.9,
    progress: Told | None = None,
) -> Clusters:
    """The cluster of each machine type that trains `tokens` in `days` and within `budget`, and its cost.

    hardware: one machine type or several, as for mopsim.simulate. tokens: tokens to train on, decimal
    ("1T"). days: deadline in days; days or budget is needed. budget: dollars ("10M") for the rent of the run,
    or with `buy` for the purchase. With a budget alone the fastest cluster is recommended, else the cheapest.
    confidence: probability of meeting the deadline that is asked for. global_batch_tokens: tokens of a
    step (binary, "4M"), fitted to each cluster. families: as for mopsim.search. runnable: as for
    mopsim.search. max_nodes: largest number of nodes; 512 if neither limit is given. max_devices: largest
    number of devices. prices: dollars per device and hour, by profile. reserved: rent at the profile's
    price times `reserved_factor`. buy: buy the cluster. capex: dollars of a node, by profile. sites: a
    YAML file of data centres (mopsim/size/sites.yaml is one). assumptions: values that replace those of
    mopsim/size/assumptions.yaml, by name. utilisation: share of the wall clock that trains, instead of the
    computed goodput. max_cost: most dollars of the `fastest` cluster. simulations: simulations of a family
    at a searched node count. document_tokens: as for mopsim.simulate. interval: probability of all
    intervals. jobs: number of processes. progress: called as progress(done, known so far, what was asked).

    That no cluster meets the limits is a result. Raises MopError."""
    network, length, most = read_model(model), count(seq_len, "seq_len"), _dollars(max_cost, "--max-cost")
    goal = _goal(parse_tokens(str(tokens), "tokens"), days, _dollars(budget, "--budget"), most)
    machines = _distinct(hardware)
    request = Request(
        network, goal, length, _batch(global_batch_tokens, length), read_families(families),
        max_nodes, simulations, runnable, assume(assumptions, utilisation),
        _terms(machines, buy, reserved, prices or {}, capex or {}), read_sites(sites),
        _confidence(confidence), precision, read_routing(routing), read_stack(stack), interval, most,
        max_devices, read_documents(document_tokens).get("document_tokens", 0),
    )  # fmt: skip
    _check(request, machines)
    return Clusters(request, _size_all(request, machines, jobs, progress))


def _check(request: Request, machines: Sequence[HardwareProfile]) -> None:
    """Raises MopError for a training that the model cannot have, a limit below 1, where a machine has no such
    products, and where no node of it is allowed."""
    request.training(1).check_model(request.model)
    check_level(request.interval)
    for name in ("max_nodes", "max_devices"):
        value = getattr(request, name)
        require(value is None or value > 0, name, value, "must be at least 1")
    for machine in machines:
        matmul_curve(machine, request.precision, field="precision")
        rule = f"is less than a node of {machine.name}, {machine.devices_per_node} devices: leave it out"
        require(request.most_nodes(machine) > 0, "max_devices", request.max_devices, rule)


def _batch(tokens: Count, seq_len: int) -> int:
    """Tokens of a step. Raises MopError where they are no sequence."""
    batch = count(tokens, "global_batch_tokens")
    require(batch >= seq_len, "global_batch_tokens", batch, f"is less than one sequence, seq_len {seq_len}")
    return batch


def _distinct(given: AnyHardware | Sequence[AnyHardware]) -> list[HardwareProfile]:
    """The machine types that are given. Raises MopError for a profile that is given twice, and for two that
    differ and have one name."""
    found: dict[str, HardwareProfile] = {}
    each = [given] if isinstance(given, str | Path | HardwareProfile) else given
    profiles = [read_hardware(one) for one in each]
    for one in profiles:
        if found.setdefault(one.name, one) != one:
            raise MopError(f"hardware: {one.name!r} is the name of two different profiles: rename one")
    require_once([one.name for one in profiles], "hardware")
    return profiles


def _dollars(given: float | str | None, field: str) -> float | None:
    return None if given is None else parse_dollars(str(given), field)


def _goal(tokens: int, days: float | None, budget: float | None, max_cost: float | None) -> Goal:
    """Raises MopError for limits out of range, or none at all. max_cost alone is a budget."""
    if days is not None and not 1e-3 <= days < 1e6:
        raise MopError(f"--days: {days:g} must lie between 0.001 and a million")
    limit = budget if budget is not None or days is not None else max_cost
    if days is None and limit is None:
        raise MopError("--days: none given; --days, --budget or both are needed")
    return Goal(tokens, None if days is None else days * DAY, limit)


def _confidence(confidence: float) -> float:
    if not 0.01 <= confidence <= 0.999:
        raise MopError(f"--confidence: {confidence:g} must lie between 0.01 and 0.999")
    return confidence


def _terms(
    machines: Sequence[HardwareProfile],
    buy: bool,
    reserved: bool,
    prices: Mapping[str, float],
    capex: Mapping[str, float],
) -> Terms:
    """Raises MopError for a price of a machine that was not asked for or out of range, and for a purchase's
    where nothing is bought."""
    if capex and not buy:
        raise MopError("--capex: is of a purchase: give --buy too")
    names = {machine.name for machine in machines}
    for option, given, least, most in (("price", prices, 1e-4, 1e4), ("capex", capex, 1.0, 1e9)):
        for name, dollars in given.items():
            if name not in names:
                raise MopError(f"--{option}: {name!r} is not one of {', '.join(sorted(names))}")
            if not least <= dollars <= most:
                text = shown(dollars) if isinstance(dollars, int) else f"{dollars:g}"
                raise MopError(f"--{option} {name}: {text} must lie between {least:g} and {most:g} dollars")
    bought = with_capex(node_prices(), capex)
    unknown = sorted(names - set(bought)) if buy else []
    if unknown:
        raise MopError(f"--buy: no price of a node of {', '.join(unknown)} is known; --capex NAME=DOLLARS")
    return Terms(buy, reserved, dict(prices), bought)


def _size_all(
    request: Request, machines: Sequence[HardwareProfile], jobs: int, progress: Told | None
) -> list[Sizing]:
    """In the order of `machines`; questions side by side in at most `jobs` processes."""
    if jobs < 2:
        return size_all(request, machines, progress=progress)
    with pool(jobs) as processes:
        return size_all(request, machines, beside(request, processes), progress)
