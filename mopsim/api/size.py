"""mopsim.size: which machine type, and how many nodes of it."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
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
    read_families,
    read_hardware,
    read_model,
    read_routing,
    read_stack,
)
from mopsim.api.results import Result, Simulation
from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.common.processes import pool
from mopsim.common.units import parse_tokens
from mopsim.cost.compute import matmul_curve
from mopsim.engine import SimResult
from mopsim.report.sizing import COLUMNS, row, summary
from mopsim.size import Assumptions, Goal, Point, Sizing
from mopsim.size import size as sized
from mopsim.size.figures import DAY
from mopsim.size.finder import Request, recommend
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.strategy import MatmulDType
from mopsim.spec.training import TrainSpec
from mopsim.strategies import FAMILIES

if TYPE_CHECKING:
    from pandas import DataFrame


class Clusters(Result):
    """For each machine type the smallest cluster that trains in time, or why there is none.

    `cheapest` and `fastest` (within max_cost) are of all clusters that were tried; None where none will do.
    """

    recommended: dict[str, Any] | None
    hardware: list[dict[str, Any]]

    def __init__(self, request: Request, sizings: Sequence[Sizing], max_cost: float | None) -> None:
        self.request, self.sizings = request, list(sizings)
        tried = [point for sizing in sizings for point in sizing.tried]
        self.cheapest, self.fastest = recommend(tried, max_cost)

    @cached_property
    def best(self) -> Simulation | None:
        """The step of the recommended cluster: the cheapest, or the fastest where no price is known."""
        chosen = self.cheapest or self.fastest
        if chosen is None or chosen.result is None:
            return None
        nodes, training = chosen.num_nodes, chosen.training
        inputs = Inputs(
            self.request.model, chosen.hardware, nodes, training, self.request.precision, self.request.stack
        )
        return Simulation(inputs, chosen.result)

    def headline(self) -> str:
        return f"cheapest: {summary(self.cheapest)}; fastest: {summary(self.fastest)}"

    def _points(self) -> list[Point]:
        return [sizing.best for sizing in self.sizings if sizing.best]

    def _results(self) -> Sequence[SimResult]:
        return [point.result for point in self._points() if point.result]

    def frame(self) -> "DataFrame":
        """A row for each machine type: seconds, dollars, joules, bytes; else NaN and the `reason`."""
        from pandas import DataFrame

        rows = [
            {"hardware": sizing.hardware.name, "reason": sizing.why}
            | ({} if sizing.best is None else _point_json(sizing.best))
            for sizing in self.sizings
        ]
        return DataFrame([{name: one for name, one in row.items() if name != "result"} for row in rows])

    def tried(self) -> "DataFrame":
        """A row for each cluster that was tried."""
        from pandas import DataFrame

        return DataFrame(
            [{"hardware": s.hardware.name} | _tried_json(point) for s in self.sizings for point in s.tried]
        )

    def table(self) -> "DataFrame":
        """A row for each machine type that can, as text for people."""
        from pandas import DataFrame

        return DataFrame([row(point) for point in self._points()], columns=list(COLUMNS))

    def to_json(self) -> dict[str, Any]:
        request, sizings, cheapest, fastest = self.request, self.sizings, self.cheapest, self.fastest
        return {
            "model": request.model.name,
            "tokens": request.goal.tokens,
            "deadline_s": request.goal.seconds,
            "seq_len": request.seq_len,
            "global_batch_tokens": request.batch_tokens,
            "assumptions": {"utilisation": request.assumptions.utilisation, "pue": request.assumptions.pue},
            "families": list(request.families),
            "stack": request.stack.name if request.stack else None,
            "budget": request.budget,
            "hardware": [_sizing_json(sizing) for sizing in sizings],
            "recommended": _point_json(cheapest) if cheapest else None,
            "fastest": _point_json(fastest) if fastest else None,
            "version": mopsim.__version__,
        }


def size(
    model: AnyModel,
    hardware: AnyHardware | Sequence[AnyHardware],
    *,
    tokens: int | str,
    days: float,
    seq_len: Count = 4096,
    global_batch_tokens: Count = "4M",
    families: str | Sequence[str] | None = None,
    runnable: bool = False,
    max_nodes: int = 512,
    utilisation: float = 0.9,
    pue: float = 1.3,
    max_cost: float | None = None,
    budget: int = 40,
    routing: str | Sequence[float] = "balanced",
    precision: MatmulDType = "bfloat16",
    jobs: int = 1,
    stack: AnyStack | None = None,
    progress: Callable[[str], None] | None = None,
) -> Clusters:
    """The smallest cluster of each machine type that trains `tokens` in `days`, and what it costs.

    hardware: one machine type or several, as for mopsim.simulate. tokens: to train on, decimal ("1T"). days:
    wall clock. global_batch_tokens: tokens of a step (binary, "4M"), fitted to each cluster. families,
    runnable: as for mopsim.search. max_nodes: at most. utilisation: share of the wall clock that trains.
    pue: power of the building over that of its machines. max_cost: dollars, for `fastest`. budget:
    simulations of a family at each node count. jobs: processes. progress(text): told what is being tried.

    That no cluster will do is a result. Raises MopError.
    """
    given = [hardware] if isinstance(hardware, str | Path | HardwareProfile) else list(hardware)
    if not 1e-3 <= days < 1e6:
        raise MopError(f"days: {days:g} must lie between 0.001 and a million")
    network, length, routed = read_model(model), count(seq_len, "seq_len"), read_routing(routing)
    TrainSpec(seq_len=length, global_batch=1, routing=routed).check_model(network)
    request = Request(
        model=network,
        goal=Goal(parse_tokens(str(tokens), "tokens"), days * DAY),
        seq_len=length,
        batch_tokens=count(global_batch_tokens, "global_batch_tokens"),
        families=read_families(families, FAMILIES),
        max_nodes=max_nodes,
        budget=budget,
        runnable=runnable,
        assumptions=Assumptions(utilisation, pue),
        precision=precision,
        routing=routed,
        stack=read_stack(stack),
    )
    machines = list({machine.name: machine for machine in map(read_hardware, given)}.values())
    for machine in machines:
        matmul_curve(machine, precision, field="precision")
    recommend([], max_cost)  # refuses a bad one before the work
    return Clusters(request, _size_all(request, machines, jobs, progress or (lambda text: None)), max_cost)


def _size_all(
    request: Request, machines: Sequence[HardwareProfile], jobs: int, show: Callable[[str], None]
) -> list[Sizing]:
    """In the order of `machines`, side by side in at most `jobs` processes. show: what is being asked."""
    workers = min(len(machines), jobs)
    if workers < 2:
        return [sized(request, one, lambda n, name: show(f"{n} nodes of {name}")) for one in machines]
    show(", ".join(machine.name for machine in machines))
    with pool(workers) as processes:
        return list(processes.map(partial(sized, request), machines))


def _sizing_json(sizing: Sizing) -> dict[str, Any]:
    price, power = sizing.hardware.price_per_device_hour, sizing.hardware.device.power
    node = sizing.hardware.node_power
    return {
        "name": sizing.hardware.name,
        "digest": io.digest(sizing.hardware),
        "can": sizing.best is not None,
        "reason": sizing.why or None,
        "price_per_device_hour_usd": price.si if price else None,
        "price_source": f"{price.tag}: {price.source}" if price else None,
        "device_power_w": power.si if power else None,
        "node_power_w": node.si if node else None,
        "hosts_in_energy": node is not None,
        "simulated": sizing.simulated,
        "best": _point_json(sizing.best) if sizing.best else None,
        "tried": [_tried_json(point) for point in sizing.tried],
    }


def _tried_json(point: Point) -> dict[str, Any]:
    bill = point.figures
    return {
        "nodes": point.num_nodes,
        "in_time": point.in_time,
        "reason": point.why or None,
        "duration_s": bill.seconds if bill else None,
        "cost_usd": bill.cost if bill else None,
    }


def _point_json(point: Point) -> dict[str, Any]:
    result, bill = point.result, point.figures
    assert result is not None
    assert bill is not None
    return {
        "hardware": point.hardware.name,
        "nodes": point.num_nodes,
        "devices": point.num_devices,
        "duration_s": bill.seconds,
        "days": bill.days,
        "device_seconds": bill.device_seconds,
        "device_hours": bill.device_hours,
        "cost_usd": bill.cost,
        "energy_j": bill.energy,
        "steps": point.num_steps,
        "global_batch": point.training.global_batch,
        "tokens_per_s": result.tokens_per_second,
        "memory_headroom_bytes": result.memory_limit - result.peak_memory,
        "host_headroom_bytes": result.host_limit - result.host_memory,
        "proven": point.gap == 0,
        "gap": point.gap,
        "result": result.to_json(),
    }
