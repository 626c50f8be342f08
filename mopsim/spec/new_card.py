"""A profile of a card that nobody measured: its data sheet, and the nearest known card for the rest."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mopsim.common.errors import MopError
from mopsim.common.io import convert, to_plain
from mopsim.common.shipped import shipped
from mopsim.common.units import UNITS
from mopsim.spec.hardware import HardwareProfile, Quantity, Rounds

Plain = dict[str, Any]

DTYPES = {"bfloat16": "bf16", "float16": "bf16", "fp8": "fp8"}
"""The figure that is the peak of a dtype."""
FOLLOWS = {"fp8": "bf16 rate", "node-power": "GPU power"}
"""Figures that are not given and follow another, by which they are scaled."""
Given = Mapping[str, Quantity]


FAR = 20.0
"""Times beyond the least and the most of known cards that a figure may be: further is a slip of units."""


def check_figures(profiles: Sequence[HardwareProfile], given: Given) -> None:
    """Refuse a figure that is far from those of all known cards, or that contradicts another. Raises
    MopError."""
    known = [figures_of(one) for one in profiles if one.device.architecture]
    for name, quantity in given.items():
        own = sorted((one[name] for one in known if name in one), key=lambda one: one.si)
        if own and not own[0].si / FAR <= quantity.si <= own[-1].si * FAR:
            span = f"{own[0].text} to {own[-1].text}"
            raise MopError(
                f"{name}: {quantity.text} must lie within {FAR:g} times of what known cards have ({span})"
            )
    power, node = given.get("power"), given.get("node-power")
    if power and node and node.si < power.si:
        raise MopError(f"node-power: {node.text} must be at least the power of a device ({power.text})")


def nearest_card(
    profiles: Sequence[HardwareProfile], given: Given, architecture: str = ""
) -> HardwareProfile:
    """The profile whose figures differ least from those given, by the sum of |log ratio|; of an architecture,
    where one is named. Raises MopError where none is of it."""
    known = [one for one in profiles if one.device.architecture]
    if architecture:
        names = sorted({one.device.architecture for one in known})
        known = [one for one in known if one.device.architecture == architecture]
        if not known:
            raise MopError(f"architecture: {architecture[:40]!r} is not one of {', '.join(names)}")

    def apart(one: HardwareProfile) -> float:
        own = figures_of(one)
        return sum(
            abs(math.log(quantity.si / own[name].si))
            for name, quantity in given.items()
            if name in own and quantity.si > 0 and own[name].si > 0
        )

    return min(known, key=lambda one: (apart(one), one.name))


def figures_of(profile: HardwareProfile) -> dict[str, Quantity]:
    """A profile's own figures, by their names; the bandwidth as kernels reach it."""
    peaks = {DTYPES[curve.dtype]: curve.peak for curve in profile.device.matmul if curve.dtype in DTYPES}
    found = {
        "memory": profile.device.memory, "memory-bandwidth": profile.device.memory_bandwidth, **peaks,
        "scale-up": profile.scale_up.peak, "nic": profile.scale_out.peak, "host-link": profile.host.link_h2d,
        "host-memory": profile.host.memory, "power": profile.device.power, "node-power": profile.node_power,
        "price": profile.price_per_device_hour,
    }  # fmt: skip
    return {name: one for name, one in found.items() if one is not None}


def new_card(
    name: str, given: Given, near: HardwareProfile, devices_per_node: int | None = None,
    scale_up_size: int | None = None,
) -> HardwareProfile:  # fmt: skip
    """A profile with the figures given, and `near` for the rest, each number of it tagged `assumed`.

    What follows a figure scales with it: collectives with their network, copies by index and Adam with the
    memory's bandwidth, rates of other dtypes with bf16, a node's power with its devices'. Raises MopError.
    """
    card = to_plain(near)
    _assume(card, near.name)
    nodes = devices_per_node or near.devices_per_node
    card |= {
        "name": name, "corrections": {}, "calibrated_from": "", "devices_per_node": nodes,
        "scale_up_size": scale_up_size or (nodes if devices_per_node else near.scale_up_size),
        "notes": f"By `mopsim profile new`: {', '.join(given) or 'nothing'} given, the rest as {near.name}.",
    }  # fmt: skip
    _apply(card, given, near)
    return convert(card, HardwareProfile, "hardware")


def with_figures(profile: HardwareProfile, given: Given) -> HardwareProfile:
    """The profile with these figures of a data sheet, and what follows them. Raises MopError."""
    card = to_plain(profile)
    _apply(card, given, profile)
    return convert(card, HardwareProfile, "hardware")


def assumed_rounds(profiles: Sequence[HardwareProfile], architecture: str) -> Rounds | None:
    """Those of the card of an architecture on which they were timed; None where they were on none."""
    for one in profiles:
        rounds = one.scale_up.rounds
        if one.device.architecture == architecture and rounds and rounds.wait.tag == "measured":
            plain = to_plain(rounds)
            _assume(plain, one.name)
            return convert(plain, Rounds, "rounds")
    return None


def _apply(card: Plain, given: Given, near: HardwareProfile) -> None:
    for figure, apply in _APPLIED.items():
        if figure in given:
            apply(card, given[figure], near)
    if "power" in given and "node-power" not in given and near.node_power and near.device.power:
        more = near.devices_per_node * (given["power"].si - near.device.power.si)
        card["node_power"] = _assumed(
            (near.node_power.si + more) / 1e3, "kW", f"{near.name}'s by {FOLLOWS['node-power']}"
        )


def _assume(node: Any, near: str) -> None:
    """Tag every number below as assumed, from the near card."""
    if isinstance(node, dict):
        if "tag" in node and "source" in node:
            node["source"] = f"as {near} ({node['tag']}): {' '.join(node['source'].split())}"
            node["tag"] = "assumed"
        for value in node.values():
            _assume(value, near)
    elif isinstance(node, list | tuple):
        for value in node:
            _assume(value, near)


def _assumed(value: float, unit: str, source: str) -> Plain:
    return {"value": float(f"{value:.4g}"), "unit": unit, "tag": "assumed", "source": source}


def _scale(quantity: Plain, ratio: float, why: str) -> None:
    quantity["value"] = float(f"{quantity['value'] * ratio:.4g}")
    quantity["source"] = f"{why}: {quantity['source']}"


def _bandwidth(card: Plain, given: Quantity, near: HardwareProfile) -> None:
    """Kernels reach of a data sheet's bandwidth what they do on the near card."""
    sheet, reached = sheet_bandwidth(near.name), near.device.memory_bandwidth
    share = reached.si / sheet if sheet else 0.85
    why = f"{share:.3f} of {given.text} ({given.tag}: {given.source}), "
    why += f"the share of {near.name}" if sheet else "a usual share"
    device = card["device"]
    device["memory_bandwidth"] = _assumed(given.value * share, given.unit, why)
    ratio = given.si * share / reached.si
    for field in ("index_bandwidth", "adam_rate"):
        if device[field]:
            _scale(device[field], ratio, "by the memory's bandwidth")


def _rate(card: Plain, given: Quantity, near: HardwareProfile) -> None:
    """The bf16 peak; rates of other dtypes keep their ratio to it."""
    old = figures_of(near)["bf16"]
    for curve in (*card["device"]["matmul"], *card["device"]["grouped_matmul"]):
        if DTYPES.get(curve["dtype"]) == "bf16":
            curve["peak"] = to_plain(given)
        else:
            _scale(curve["peak"], given.si / old.si, f"by {FOLLOWS['fp8']}")


def _fp8(card: Plain, given: Quantity, near: HardwareProfile) -> None:
    curves = [
        one for key in ("matmul", "grouped_matmul") for one in card["device"][key] if one["dtype"] == "fp8"
    ]
    if not curves:
        raise MopError(f"fp8: {near.name} has no fp8 curve; name a card that has by near")
    for curve in curves:
        curve["peak"] = to_plain(given)


def _fabric(field: str) -> Callable[[Plain, Quantity, HardwareProfile], None]:
    def apply(card: Plain, given: Quantity, near: HardwareProfile) -> None:
        old: Quantity = getattr(near, field).peak
        card[field]["peak"] = to_plain(given)
        for curve in card[field]["collectives"].values():
            _scale(curve["bandwidth"], given.si / old.si, "by the network's peak")

    return apply


def _at(*path: str) -> Callable[[Plain, Quantity, HardwareProfile], None]:
    def apply(card: Plain, given: Quantity, near: HardwareProfile) -> None:
        inner = card
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = to_plain(given)

    return apply


def _host_link(card: Plain, given: Quantity, near: HardwareProfile) -> None:
    card["host"] |= {"link_h2d": to_plain(given), "link_d2h": to_plain(given)}


_APPLIED: dict[str, Callable[[Plain, Quantity, HardwareProfile], None]] = {
    "memory": _at("device", "memory"), "memory-bandwidth": _bandwidth, "bf16": _rate, "fp8": _fp8,
    "scale-up": _fabric("scale_up"), "nic": _fabric("scale_out"), "host-link": _host_link,
    "host-memory": _at("host", "memory"), "power": _at("device", "power"), "node-power": _at("node_power"),
    "price": _at("price_per_device_hour"),
}  # fmt: skip


def sheet_bandwidth(name: str) -> float | None:
    """Bytes/s that the data sheet of a shipped machine type says; None for any other."""
    machine = shipped("hardware_profiles", "data/machines.yaml")["machines"].get(name)
    if not machine:
        return None
    value, unit = machine["memory_bandwidth"][:2]
    return float(value) * UNITS[unit]
