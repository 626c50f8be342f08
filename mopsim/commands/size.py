"""`mopsim size`: which cluster, and how many nodes of it."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mopsim
from mopsim.api.inputs import Inputs, make_plan, read_families, read_routing
from mopsim.commands.console import human
from mopsim.commands.progress import progress
from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.common.outputs import check_outputs
from mopsim.common.processes import pool
from mopsim.common.units import parse_count, parse_tokens
from mopsim.cost.compute import matmul_curve
from mopsim.report.sizing import format_dollars, sizing_table, summary
from mopsim.search import DEFAULT_FAMILIES
from mopsim.size import Assumptions, Goal, Point, Sizing, size
from mopsim.size.figures import DAY
from mopsim.size.finder import Request, recommend
from mopsim.spec.hardware import HardwareProfile, Quantity
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.strategy import MatmulDType
from mopsim.spec.training import TrainSpec
from mopsim.strategies import FAMILIES


@dataclass(frozen=True)
class Order:
    """What is to be sized, as typed on the command line."""

    model: str
    tokens: str
    days: float
    hardware: Sequence[str]
    seq_len: str
    global_batch_tokens: str
    family: str
    max_nodes: int
    utilisation: float
    pue: float
    max_cost: float | None
    budget: int
    runnable: bool
    routing: str
    precision: MatmulDType


def run(order: Order, plan: str | None, json: str | None) -> int:
    """Size each machine type, show the answer, write the recommended plan and the JSON.

    Returns the exit code: 0, or 1 where no cluster will do (the JSON says so too). Raises MopError where a
    plan was asked for then.
    """
    from pathlib import Path

    check_outputs({"--plan": plan, "--json": json})
    request = read(order)
    machines = [load_profile(name) for name in dict.fromkeys(order.hardware)]
    for machine in machines:
        matmul_curve(machine, order.precision, field="precision")
    recommend([], order.max_cost)
    console = human(json)
    with progress(console, "sizing", None) as shown:
        sizings = _size_all(request, machines, lambda text: shown(0, text))
    cheapest, fastest = recommend([p for s in sizings for p in s.tried], order.max_cost)
    title = (
        f"{request.model.name}: {request.goal.tokens:,} tokens within {order.days:g} days, "
        f"sequences of {request.seq_len:,}"
    )
    console.print(sizing_table(sizings, cheapest, title, stated(request, sizings)))
    within = "" if order.max_cost is None else f" within {format_dollars(order.max_cost)}"
    console.print(f"Recommended (cheapest): {summary(cheapest)}\nFastest{within}: {summary(fastest)}")
    if json:
        io.write_json(json, to_json(request, sizings, cheapest, fastest))
    chosen = cheapest or fastest
    if chosen is None or chosen.result is None:
        none = f"no cluster of at most {order.max_nodes} nodes will do"
        if plan:
            raise MopError(f"--plan: {plan} not written: {none}")
        print(f"mopsim: {none}", file=sys.stderr)
        return 1
    if plan:
        inputs = Inputs(request.model, chosen.hardware, chosen.num_nodes, chosen.training, order.precision)
        io.write_yaml(Path(plan), make_plan(inputs, chosen.result))
    return 0


def _size_all(
    request: Request, machines: Sequence[HardwareProfile], show: Callable[[str], None]
) -> list[Sizing]:
    """In the order of `machines`, side by side where there are cores. show: what is being asked."""
    workers = min(len(machines), os.cpu_count() or 1)
    if workers < 2:
        return [size(request, machine, lambda n, name: show(f"{n} nodes of {name}")) for machine in machines]
    show(", ".join(machine.name for machine in machines))
    with pool(workers) as processes:
        return list(processes.map(partial(size, request), machines))


def read(order: Order) -> Request:
    """The request of an order. Raises MopError in one line."""
    if not 1e-3 <= order.days < 1e6:
        raise MopError(f"--days: {order.days:g} must lie between 0.001 and a million")
    seq_len = parse_count(order.seq_len, "--seq-len")
    model = load_model(order.model)
    routing = read_routing(order.routing)
    TrainSpec(seq_len=seq_len, global_batch=1, routing=routing).check_model(model)
    return Request(
        model=model,
        goal=Goal(parse_tokens(order.tokens, "--tokens"), order.days * DAY),
        seq_len=seq_len,
        batch_tokens=parse_count(order.global_batch_tokens, "--global-batch-tokens"),
        families=read_families(order.family, DEFAULT_FAMILIES if order.runnable else FAMILIES),
        max_nodes=order.max_nodes,
        budget=order.budget,
        any_plan=not order.runnable,
        assumptions=Assumptions(order.utilisation, order.pue),
        precision=order.precision,
        routing=routing,
    )


def stated(request: Request, sizings: Sequence[Sizing]) -> list[str]:
    """What the figures rest on: a line for the assumptions, one a machine for price and power."""
    a = request.assumptions
    lines = [
        f"Assumed: {a.utilisation:.0%} of the wall clock trains (--utilisation); PUE {a.pue:g} over rated "
        f"power, switches between nodes not counted (--pue); about {request.batch_tokens:,} tokens a step "
        "(--global-batch-tokens).",
        f"Searched: {', '.join(request.families)}, at most {request.budget} simulations of each a node count "
        f"({sum(one.simulated for one in sizings):,} in all); more may find a cheaper cluster (--budget).",
    ]
    for sizing in sizings:
        lines.append(
            f"{sizing.hardware.name}: price {_quantity(sizing.hardware.price_per_device_hour)}; "
            f"power {_power(sizing.hardware)}"
        )
    return lines


def _power(hardware: HardwareProfile) -> str:
    """What the energy counts (mopsim.size.figures.drawn)."""
    if hardware.node_power is not None:
        return f"of a node of {hardware.devices_per_node} devices {_quantity(hardware.node_power)}"
    if hardware.device.power is not None:
        return f"of a device {_quantity(hardware.device.power)}, hosts not counted"
    return "-"


def _quantity(quantity: Quantity | None) -> str:
    if quantity is None:
        return "-"
    return f"{quantity.value:g} {quantity.unit} ({quantity.tag}: {' '.join(quantity.source.split())})"


def to_json(
    request: Request, sizings: Sequence[Sizing], cheapest: Point | None, fastest: Point | None
) -> dict[str, Any]:
    """SI units: seconds, bytes, joules; dollars."""
    return {
        "model": request.model.name,
        "tokens": request.goal.tokens,
        "deadline_s": request.goal.seconds,
        "seq_len": request.seq_len,
        "global_batch_tokens": request.batch_tokens,
        "assumptions": {"utilisation": request.assumptions.utilisation, "pue": request.assumptions.pue},
        "families": list(request.families),
        "budget": request.budget,
        "hardware": [_sizing_json(sizing) for sizing in sizings],
        "recommended": _point_json(cheapest) if cheapest else None,
        "fastest": _point_json(fastest) if fastest else None,
        "version": mopsim.__version__,
    }


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
        "result": result.to_json(),
    }
