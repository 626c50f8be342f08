"""The JSON of `mopsim size`: SI units, dollars, kilograms; days and gpus for whoever reads it."""

from dataclasses import asdict
from math import isfinite
from typing import Any

from mopsim.common import io
from mopsim.search.result import exhausted
from mopsim.size.assumptions import NAMES
from mopsim.size.decided import Rival
from mopsim.size.figures import DAY, rated
from mopsim.size.goodput import Goodput
from mopsim.size.points import Miss, Point, Request, Sizing


def sizing_json(sizing: Sizing, request: Request, least: float | None) -> dict[str, Any]:
    """One machine type, by the prices and assumptions that its bill has. least: dollars that the recommended
    cluster costs."""
    here, hardware = request.at(sizing.bill), sizing.hardware
    rival = sizing.rival.figures if sizing.rival else None
    even = rival.price_for(least) if rival and least else None
    price, power = here.terms.price(hardware, here.sites[0], here.assumptions), hardware.device.power
    return {
        "name": hardware.name,
        "digest": io.digest(hardware),
        "can": sizing.best is not None,
        "reason": sizing.why or None,
        "price_per_device_hour_usd": price.dollars if price else None,
        "break_even_price_per_device_hour_usd": even,
        "price_source": price.source if price else None,
        "device_power_w": power.si if power else None,
        "node_power_w": rated(hardware, here.assumptions),
        "node_power_tag": hardware.node_power.tag if hardware.node_power else "assumed",
        "simulated": sizing.simulated,
        "best": point_json(sizing.best, request) if sizing.best else None,
        "tried": [_tried_json(point, request) for point in sizing.tried],
    }


def _keeps(point: Point, request: Request) -> dict[str, bool | None]:
    """Whether it keeps each limit; None for one that was not asked for."""
    goal = request.goal
    return {
        "in_time": point.in_time if goal.seconds is not None else None,
        "within_budget": point.affordable if goal.budget is not None else None,
    }


def _tried_json(point: Point, request: Request) -> dict[str, Any]:
    bill = point.figures
    return {
        "nodes": point.num_nodes,
        **_keeps(point, request),
        "reason": point.why or None,
        "duration_s": bill.seconds if bill else None,
        "cost_usd": bill.cost if bill else None,
    }


def point_json(point: Point, request: Request) -> dict[str, Any]:
    """A cluster that fits, with its step."""
    result, bill = point.step_and_bill
    spent = {"cost_usd": "cost", "capex_usd": "capex", "energy_j": "energy", "carbon_kg": "carbon"}
    return {
        **brief_json(point, request),
        "devices": point.num_devices,
        "duration_s": bill.seconds,
        "device_seconds": bill.device_seconds,
        "device_hours": bill.device_hours,
        "steps": point.num_steps,
        "global_batch": point.training.global_batch,
        "tokens_per_s": result.tokens_per_second,
        "memory_headroom_bytes": result.memory_limit - result.peak_memory,
        "host_headroom_bytes": result.host_limit - result.host_memory,
        "proven": exhausted(point.gap),
        "gap": point.gap,
        "network": asdict(bill.network) if bill.network else None,
        "reliability": _reliability(bill.goodput),
        "cost_by_part_usd": dict(bill.parts),
        "sites": [
            {"site": one.site} | {key: getattr(one, name) for key, name in spent.items()}
            for one in point.sites
        ],
        "result": result.to_json(request.interval),
    }


def _reliability(good: Goodput | None) -> dict[str, Any] | None:
    """What fails, and what it costs; None between failures that never come."""
    if good is None:
        return None
    return asdict(good) | {"mtbf": good.mtbf if isfinite(good.mtbf) else None}


def brief_json(point: Point, request: Request) -> dict[str, Any]:
    """A cluster that fits, in a line."""
    (result, bill), goal = point.step_and_bill, request.goal
    low, high = bill.seconds_interval(request.interval)
    costs = bill.cost_interval(request.interval)
    return {
        "hardware": point.hardware.name,
        "nodes": point.num_nodes,
        "gpus": point.num_devices,
        "billed_nodes": bill.billed_nodes,
        "spare_nodes": bill.goodput.spares if bill.goodput else 0,
        "days": bill.days,
        "days_interval": [low / DAY, high / DAY],
        "cost_usd": bill.cost,
        "cost_interval": list(costs) if costs else None,
        "capex_usd": bill.capex,
        "energy_j": bill.energy,
        "carbon_kg": bill.carbon,
        "site": bill.site,
        "p_deadline": bill.p_within(goal.seconds),
        "p_budget": bill.p_budget(goal.budget),
        "p_fits": result.p_fits,
        "p_fits_as_described": result.p_as_described,
        "goodput": bill.goodput.share if bill.goodput else None,
        "measured_over_predicted": bill.measured_over_predicted,
        **_keeps(point, request),
        "reason": point.why or None,
        "strategy": io.to_plain(result.strategy),
        "strategy_line": result.line,
        "stack": result.stack.name,
    }


def rival_json(rival: Rival, request: Request) -> dict[str, Any]:
    """A cluster of another machine type that may be better. worse, slack: fractions, as of `Rival`."""
    return {**brief_json(rival.point, request), "worse": rival.worse, "slack": rival.slack}


def miss_json(miss: Miss | None, request: Request) -> dict[str, Any] | None:
    """The nearest cluster that does not do, and the limits that would."""
    if miss is None:
        return None
    thin = miss.thin is not None
    needs = {"days": miss.days, "budget_usd": miss.dollars, "nodes": miss.nodes, "larger_batch": thin}
    return {**brief_json(miss.point, request), "needs": {name: one for name, one in needs.items() if one}}


def assumptions_json(request: Request) -> dict[str, Any]:
    """Every assumption in use, of a request at one site. `utilisation`: None where it is reckoned from
    failures, for each cluster."""
    a = request.assumptions
    return {
        "utilisation": a.utilisation,
        **{name: getattr(a, name) for name in NAMES},
        "interval_level": request.interval,
        "sources": {name: request.source(name) for name in NAMES},
    }
