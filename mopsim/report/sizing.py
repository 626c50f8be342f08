"""The tables of `mopsim size`: what a buyer asks of a cluster."""

from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from mopsim.common.units import format_bytes, format_seconds
from mopsim.report.tables import describe
from mopsim.report.terminal import table
from mopsim.search.result import proof
from mopsim.size.finder import Point, Request, Sizing
from mopsim.spec.hardware import HardwareProfile, Quantity

COLUMNS = ("machine", "nodes", "devices", "days", "cost", "energy", "MFU")
"""days: wall clock. energy: `>` where hosts are not counted."""


def row(point: Point) -> list[str]:
    """The cells of COLUMNS for a point that fits; '-' where the profile does not say."""
    result, bill = point.result, point.figures
    assert result is not None
    assert bill is not None
    return [
        point.hardware.name,
        f"{point.num_nodes:,}",
        f"{point.num_devices:,}",
        f"{bill.days:,.1f}",
        "-" if bill.cost is None else format_dollars(bill.cost),
        _energy(point),
        f"{result.mfu:.1%}",
    ]


def _details(point: Point) -> str:
    """What the columns have no room for. Free: of a device below the limit, of a rank's share of the host."""
    result, bill, training = point.result, point.figures, point.training
    assert result is not None
    assert bill is not None
    tokens = training.global_batch * training.seq_len
    return (
        f"{point.hardware.name}: {describe(result.strategy)}; {training.global_batch:,} sequences "
        f"({tokens:,} tokens) a step, {point.num_steps:,.0f} steps of {format_seconds(result.step_time)}, "
        f"{result.tokens_per_second:,.0f} tokens/s in all; {bill.device_hours:,.0f} device-hours; free: "
        f"device {_headroom(result.memory_limit, result.peak_memory)}, at least "
        f"{_headroom(result.memory_limit, result.peak_upper)}; host "
        f"{_headroom(result.host_limit, result.host_memory)}, at least "
        f"{_headroom(result.host_limit, result.host_upper)}"
    )


def _energy(point: Point) -> str:
    energy = point.figures.energy if point.figures else None
    if energy is None:
        return "-"
    return f"{'' if point.hardware.node_power else '> '}{energy / 3.6e9:,.3g} MWh"


def format_dollars(dollars: float) -> str:
    """'$1.23 M', '$45.6 k' or '$12'."""
    for unit, scale in (("M", 1e6), ("k", 1e3)):
        if dollars >= scale:
            return (
                f"${dollars / scale:,.3g} {unit}"
                if dollars < 1000 * scale
                else f"${dollars / scale:,.0f} {unit}"
            )
    return f"${dollars:,.0f}"


def _headroom(limit: int, used: int) -> str:
    return f"{format_bytes(limit - used)} ({1 - used / limit:.0%})" if limit else "-"


def sizing_table(
    sizings: Sequence[Sizing], recommended: Point | None, title: str, assumptions: Sequence[str]
) -> Group:
    """One line a machine: its smallest cluster that trains in time, or why it can't; then each strategy."""
    shown = table(title, COLUMNS[:1], COLUMNS[1:])
    lines: list[Text] = []
    for sizing in sizings:
        if sizing.best is None:
            shown.add_row(sizing.hardware.name, "cannot", *["-"] * (len(COLUMNS) - 2), style="red")
            lines.append(Text(f"{sizing.hardware.name}: cannot: {sizing.why}", style="red"))
            continue
        chosen = recommended is not None and recommended is sizing.best
        shown.add_row(*row(sizing.best), style="bold green" if chosen else None)
        lines.append(Text(_details(sizing.best)))
    return Group(shown, *lines, *(Text(line, style="dim") for line in assumptions))


def summary(point: Point | None) -> str:
    """'16 nodes (128 devices) of h200-sxm-141g: 27.2 days, $120 k' or 'none'."""
    if point is None or point.figures is None:
        return "none"
    cost = "price unknown" if point.figures.cost is None else format_dollars(point.figures.cost)
    cluster = point.hardware.cluster(point.num_nodes)
    return f"{cluster}: {point.figures.days:,.1f} days, {cost} ({proof(point.gap)})"


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
