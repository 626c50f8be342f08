"""What no profile knows, as data: values with spread, bounds and source; prices of nodes; sites."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import msgspec

from mopsim.common.errors import MopError, require, require_name, shown
from mopsim.common.io import Spec, convert, exists, read_yaml
from mopsim.common.nearest import unknown
from mopsim.common.shipped import named_in
from mopsim.common.units import read_amount
from mopsim.common.values import number_problem, parse_float
from mopsim.spec.hardware import Tag


class Assumed(Spec, frozen=True, kw_only=True):
    """One assumption. low, high: about nine in ten lie between. least, most: what is accepted. says: what it
    is."""

    value: float
    low: float
    high: float
    least: float
    most: float
    unit: str
    tag: Tag
    says: str
    source: str

    def __post_init__(self) -> None:
        ordered = self.least <= self.low <= self.value <= self.high <= self.most
        require(ordered, "value", self.value, "must lie in order: least, low, value, high, most")


SITE = ("power_price", "pue", "carbon", "space_price")
"""Assumptions that a site may replace."""
DEFAULT = "default"
"""The site of whoever names none."""


class Capex(Spec, frozen=True, kw_only=True):
    """Dollars of a node as bought; low, high: the spread of quotes."""

    value: float
    low: float
    high: float
    tag: Tag
    dated: str
    source: str


class Site(Spec, frozen=True, kw_only=True):
    """A data centre. Fields that are None are those of the assumptions. rent: dollars per device and hour by
    hardware profile."""

    name: str
    power_price: float | None = None
    pue: float | None = None
    carbon: float | None = None
    space_price: float | None = None
    rent: dict[str, float] = msgspec.field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        require_name(self.name)
        for name in SITE:
            value = getattr(self, name)
            if value is not None:
                check(name, value, name)
        for name, price in self.rent.items():
            require(0 < price < 1e4, f"rent.{name}", price, "must be above 0 and below 10000 USD/h")


HERE = Site(name=DEFAULT)


@dataclass(frozen=True)
class Assumptions:
    """The values in use, by the names of assumptions.yaml, SI units but where the name's unit says otherwise.

    utilisation: share of the wall clock that trains, given instead of reckoned from failures; None: reckoned.
    given: names that the user set, whose spread is then none.
    """

    step_time_spread: float
    failure_rate: float
    hardware_share: float
    restart_time: float
    repair_time: float
    checkpoint_bandwidth: float
    checkpoint_asynchronous: float
    checkpoint_stall: float
    straggler_spread: float
    draw_share: float
    node_over_devices: float
    pue: float
    power_price: float
    carbon: float
    space_price: float
    reserved_factor: float
    rent_spread: float
    years: float
    usage: float
    interest: float
    residual: float
    support_share: float
    staff_cost: float
    port_rate: float
    switch_ports: float
    switch_price: float
    optics_price: float
    switch_power: float
    storage_capacity: float
    storage_price: float
    utilisation: float | None = None
    given: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if self.utilisation is not None and not 0.001 <= self.utilisation <= 1:
            raise MopError(f"--utilisation: {self.utilisation:g} must lie between 0.001 and 1")

    def with_(self, **values: float) -> "Assumptions":
        """These, with other values. Raises MopError naming one that is out of range."""
        for name, value in values.items():
            check(name, value)
        return replace(self, **values)  # type: ignore[arg-type]

    def at(self, site: Site) -> "Assumptions":
        """These, with what the site has of its own."""
        own = {name: getattr(site, name) for name in SITE if getattr(site, name) is not None}
        return replace(self, **own, given=(*self.given, *own)) if own else self


known = named_in("mopsim.size", Assumed, "assumptions.yaml")
"""The shipped assumptions by name."""
node_prices = named_in("mopsim.size", Capex, "capex.yaml")
"""The shipped prices of nodes by hardware profile."""


def with_capex(prices: Mapping[str, Capex], given: Mapping[str, float]) -> dict[str, Capex]:
    """`prices`, with those that a user gives, whose spread is none."""
    own = {
        name: Capex(value=one, low=one, high=one, tag="assumed", dated="today", source="given")
        for name, one in given.items()
    }
    return {**prices, **own}


def check(name: str, value: Any, field: str = "") -> None:
    """Raise SpecError unless `name` is an assumption and `value` a number within its bounds. field: what the
    line names, where that is not --assume."""
    found = known().get(name)
    if found is None:
        raise unknown("--assume", name, known(), "assumption", file=False)
    field = field or f"--assume {name}"
    number = isinstance(value, int | float) and not isinstance(value, bool) and not number_problem(value)
    require(number, field, value, "must be a finite number")
    unit = "" if found.unit == "1" else f" {found.unit}"
    rule = f"must lie between {found.least:g} and {found.most:g}{unit} ({found.says})"
    require(found.least <= value <= found.most, field, value, rule)


def assume(given: Mapping[str, float] | None = None, utilisation: float | None = None) -> Assumptions:
    """The shipped assumptions, with `given` values instead. Raises MopError."""
    for name, value in (given or {}).items():
        check(name, value)
    values = {name: one.value for name, one in known().items()} | dict(given or {})
    return Assumptions(**values, utilisation=utilisation, given=tuple(given or {}))


def read_values(texts: Sequence[str], option: str, names: Sequence[str] = ()) -> dict[str, float]:
    """NAME=VALUE, YAML files of NAME: VALUE, or VALUE for all of `names`, as numbers by name. Raises MopError
    naming `option`."""
    found: dict[str, float] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if equals:
            data = {name.strip(): value}
        elif names and _is_number(text):
            data = dict.fromkeys(names, text)
        elif exists(Path(text)):
            data = read_yaml(Path(text), option)
        else:
            every = ", VALUE" if names else ""
            raise MopError(
                f"{option}: {shown(text)} is neither NAME=VALUE{every} nor a YAML file of NAME: VALUE"
            )
        if not isinstance(data, dict):
            raise MopError(f"{option}: {text} must hold NAME: VALUE lines")
        for key, one in data.items():
            if key in found:
                raise MopError(f"{option} {key}: {one} is its second value, {found[key]:g} is its first")
            found[str(key)] = _number(one, option, str(key))
    return found


def _is_number(text: str) -> bool:
    """Whether it says one, of whatever size."""
    try:
        return read_amount(text, 1000) is not None or math.isfinite(parse_float(text))
    except ValueError:
        return False


def _number(value: Any, option: str, name: str) -> float:
    try:
        amount = read_amount(value, 1000) if isinstance(value, str) else None
        number = parse_float(str(value)) if amount is None else float(amount)
    except ValueError:
        raise MopError(f"{option} {name}: {shown(value)} is not a number") from None
    if number != number or abs(number) == float("inf"):
        raise MopError(f"{option} {name}: {shown(value)} must be a finite number")
    return number


def read_sites(path: str | Path | None) -> tuple[Site, ...]:
    """The data centres of a YAML file: a list of sites; without one, a single site of the assumptions.
    Raises MopError."""
    if path is None:
        return (HERE,)
    data = read_yaml(Path(path), "--sites")
    if not isinstance(data, list) or not data:
        raise MopError(f"--sites: {path} must be a list of sites")
    sites = tuple(convert(one, Site, f"site {place}", str(path)) for place, one in enumerate(data, 1))
    names = [site.name for site in sites]
    if len(set(names)) < len(names):
        raise MopError(f"--sites: {path} has a name twice: {', '.join(names)}")
    return sites


NAMES = tuple(one.name for one in fields(Assumptions) if one.name not in ("utilisation", "given"))
