"""The numbers of a data sheet that a profile is made of. The help of commands names them: nothing slow is
imported before one is read."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mopsim.common.errors import MopError
from mopsim.common.units import CEILINGS, DIMENSIONS, UNITS, unit_of

if TYPE_CHECKING:
    from mopsim.spec.hardware import Quantity, Tag


@dataclass(frozen=True)
class Figure:
    """A number of a data sheet: its option, what it is, its dimension and the unit of a bare number."""

    name: str
    meaning: str
    dimension: str
    unit: str

    def read(self, text: str, tag: "Tag", source: str) -> "Quantity":
        """'96 GB', '3.35TB/s', '1,979 TFLOPS', '400 Gb/s' or a bare number in `unit`. Raises MopError."""
        from mopsim.spec.hardware import Quantity

        match = re.fullmatch(r"\s*\$?([0-9]*\.?[0-9]+(?:[eE][0-9]+)?)\s*([A-Za-z/$]*)\s*", _ungrouped(text))
        unit = unit_of(match.group(2) or self.unit, self.dimension) if match else None
        if not match or not unit:
            known = ", ".join(DIMENSIONS[self.dimension])
            raise MopError(f"{self.name}: {text[:40]!r} is not a number of {known}")
        value, most = float(match.group(1)), CEILINGS[self.dimension]
        if value * UNITS[unit] > most:
            base = next(iter(DIMENSIONS[self.dimension]))
            raise MopError(f"{self.name}: {text[:40]!r} is above {most:g} {base}: check the unit")
        return Quantity(value=value, unit=unit, tag=tag, source=source)


def _ungrouped(text: str) -> str:
    """The text without commas between thousands."""
    return re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text)


FIGURES = (
    Figure("memory", "memory of a GPU", "memory", "GB"),
    Figure("memory-bandwidth", "its bandwidth, as the data sheet says it", "bandwidth", "TB/s"),
    Figure("bf16", "dense bf16 rate, without sparsity", "arithmetic", "TFLOP/s"),
    Figure("fp8", "dense fp8 rate, without sparsity", "arithmetic", "TFLOP/s"),
    Figure(
        "scale-up", "NVLink or the like: of a GPU, each way (half of what most data sheets print)",
        "bandwidth", "GB/s",
    ),
    Figure(
        "nic",
        "network beyond an NVLink domain: of a GPU, each way (the port's rate; half of that of both ways)",
        "bandwidth", "Gbit/s",
    ),
    Figure("host-link", "what copies between a GPU and its host reach, each way", "bandwidth", "GB/s"),
    Figure("host-memory", "DRAM of a node", "memory", "TB"),
    Figure("power", "rated power of a GPU", "power", "W"),
    Figure("node-power", "rated power of a node", "power", "kW"),
    Figure("price", "dollars for an hour of a GPU", "price", "USD/h"),
)  # fmt: skip
"""What is asked for, in the order in which it is asked."""
