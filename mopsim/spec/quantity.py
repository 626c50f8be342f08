"""A number as its source gives it, and the rules that numbers of a profile keep."""

from collections.abc import Mapping
from functools import cached_property
from typing import Literal

from mopsim.common.errors import Rules, require
from mopsim.common.io import Spec
from mopsim.common.units import CEILINGS, DIMENSIONS, UNITS

Tag = Literal["datasheet", "measured", "calibrated", "assumed"]


class Quantity(Spec, frozen=True, kw_only=True, dict=True):
    """A number as its source gives it.

    value: a number that is not negative. unit: one of mopsim.common.units.UNITS (`GB/s`, `GiB`, `us`, ...).
    tag: how far to trust it: a data sheet's, measured, calibrated from runs, or assumed. source: where it
    comes from.
    """

    value: float
    unit: str
    tag: Tag
    source: str

    def _rules(self) -> Rules:
        yield self.unit in UNITS, "unit", f"is not one of {', '.join(UNITS)}"
        yield self.value >= 0, "value", "must not be negative"
        yield bool(self.source), "source", "must name where the number comes from"

    @cached_property
    def si(self) -> float:
        """The value in bytes, seconds, FLOP/s, bytes/s, watts, dollars per hour or parameters/s."""
        return self.value * UNITS[self.unit]

    @property
    def text(self) -> str:
        """'3.35 TB/s': as it is given, without its source."""
        return f"{self.value:g} {self.unit}"


def require_between(owner: Spec, low: float, high: float, *fields: str) -> None:
    """Raise SpecError naming the first field of `owner` that lies outside [low, high]."""
    for field in fields:
        value = getattr(owner, field)
        require(low <= value <= high, field, value, f"must lie between {low:g} and {high:g}")


def require_dimension(owner: Spec, dimension: str, *fields: str, least: float = 0.0) -> None:
    """Raise SpecError where a quantity of `owner` has a unit of another dimension (see units.DIMENSIONS), or
    is below `least` or above what there is of it, in SI units: the unit is wrong."""
    for field in fields:
        quantity = getattr(owner, field)
        if quantity is not None:
            known = DIMENSIONS[dimension]
            rule = f"is not a unit of {dimension}: {', '.join(known)}"
            require(quantity.unit in known, f"{field}.unit", quantity.unit, rule)
            rule = f"{known[0]} is below {least:g}: check the unit"
            require(quantity.si >= least, field, quantity.si, rule)
            rule = f"{known[0]} is above {CEILINGS[dimension]:g}: check the unit"
            require(quantity.si <= CEILINGS[dimension], field, quantity.si, rule)


def require_slower(links: Mapping[str, Quantity], memory: Quantity) -> None:
    """Raise SpecError naming the first link (by field) that is faster than the device's memory,
    where what comes over it is written."""
    for field, link in links.items():
        rule = (
            f"{link.unit} is faster than device.memory_bandwidth, {memory.text}, which "
            "writes what the link brings: check the unit (bits, both ways, a node's)"
        )
        require(link.si <= memory.si, field, link.value, rule)
