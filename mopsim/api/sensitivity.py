"""How much each assumed number of a profile moves the answer on one job."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mopsim.api.results import Simulation
from mopsim.common.errors import MopError
from mopsim.common.io import convert, to_plain
from mopsim.common.units import UNITS
from mopsim.engine import SimResult
from mopsim.program.workload import FABRICS
from mopsim.spec.hardware import HardwareProfile

REACHED = ("efficiency", "forward", "backward")
BESIDE = ("communication_share", "product_share")
"""What collectives take of the compute beside them, which has no tag of its own."""
SHARES = (*REACHED, "held", *BESIDE)
"""Numbers of a curve that are fractions and end at 1. Those that the work reaches move together; `held`, the
limit that power sets, is of its own."""
Plain = dict[str, Any]


@dataclass(frozen=True)
class Moved:
    """An assumption. value: as the profile has it. low, high: the reference job with it lower and higher;
    None where the profile refuses such a value."""

    name: str
    value: str
    low: SimResult | None
    high: SimResult | None

    def steps(self, base: SimResult) -> tuple[float, float]:
        """Relative change of the step time at the lower and the higher value."""
        low, high = (one.step_time / base.step_time - 1 if one else 0.0 for one in (self.low, self.high))
        return low, high

    def swing(self, base: SimResult) -> float:
        """The larger change; infinite where a verdict turns."""
        if any(turns(one, base) for one in (self.low, self.high)):
            return float("inf")
        return max(map(abs, self.steps(base)))


def turns(one: SimResult | None, base: SimResult) -> bool:
    """Whether one fits, or most likely does, and the other not."""
    return one is not None and (one.fits, one.sure) != (base.fits, base.sure)


def sensitivity(
    reference: Simulation, by: float = 0.2, told: Callable[[int, str], None] | None = None
) -> list[Moved]:
    """The reference's strategy once more with each assumption of its profile lower and higher by a fraction,
    those first that move it most. Numbers of one kind (of all collectives of a network, of all dtypes) move
    together. told: how many are done, and which."""
    base, profile = reference.result, reference.inputs.hardware
    found = []
    for place, (name, paths) in enumerate(assumptions(to_plain(profile)).items()):
        ends = [_played(reference, _scaled(profile, paths, 1 + sign * by)) for sign in (-1, 1)]
        found.append(Moved(name, value_of(to_plain(profile), paths), *ends))
        if told:
            told(place + 1, name)
    return sorted(found, key=lambda one: (-one.swing(base), one.name))


Path = tuple[str | int, ...]


def assumptions(profile: Plain) -> dict[str, list[Path]]:
    """The assumed numbers of a profile that time or memory depend on, by what they are."""
    groups: dict[str, list[Path]] = {}
    for path in _assumed(profile, ()):
        name = ".".join("*" if isinstance(step, int) else step for step in path)
        for fabric in FABRICS:
            if path[:2] == (fabric, "collectives"):
                name = f"{fabric}.collectives.*.{path[3]}"
        last = str(path[-1])
        groups.setdefault(name.removesuffix(last) + "efficiency" if last in REACHED else name, []).append(
            path
        )
    return groups


def _assumed(node: Any, path: Path) -> Iterator[Path]:
    if isinstance(node, list | tuple):
        for place, value in enumerate(node):
            yield from _assumed(value, (*path, place))
    if not isinstance(node, dict):
        return
    if "unit" in node:
        if node["tag"] == "assumed" and node["value"]:
            yield path
        return
    tagged = node.get("tag") == "assumed"
    for key, value in node.items():
        if (key in BESIDE and value) or (tagged and key in SHARES):
            yield (*path, key)
        elif key not in ("price_per_device_hour", "node_power", "power"):
            yield from _assumed(value, (*path, key))


def _scaled(profile: HardwareProfile, paths: Sequence[Path], factor: float) -> HardwareProfile | None:
    """The profile with those numbers changed, up to what it allows; None where it refuses them."""
    data = to_plain(profile)
    for path in paths:
        inner = _inner(data, path[:-1])
        one = inner[path[-1]]
        if isinstance(one, Mapping):
            inner[path[-1]] = {**one, "value": one["value"] * factor}
        else:
            inner[path[-1]] = min(1.0, one * factor)
    for fabric in FABRICS:
        peak = data[fabric]["peak"]
        for curve in data[fabric]["collectives"].values():
            reached = curve["bandwidth"]
            reached["value"] = min(
                reached["value"], peak["value"] * UNITS[peak["unit"]] / UNITS[reached["unit"]]
            )
    try:
        return convert(data, HardwareProfile, "hardware")
    except MopError:
        return None


def _inner(data: Any, path: Path) -> Any:
    for step in path:
        data = data[step]
    return data


def value_of(data: Plain, paths: Sequence[Path]) -> str:
    """'20 us'; of several that differ, the least and the most."""
    found = [_inner(data, path) for path in paths]
    numbers = [one["value"] if isinstance(one, Mapping) else one for one in found]
    unit = found[0]["unit"].removesuffix("1") if isinstance(found[0], Mapping) else ""
    low, high = min(numbers), max(numbers)
    return f"{low:.4g}{f' to {high:.4g}' if high > low else ''}{f' {unit}' if unit else ''}"


def _played(reference: Simulation, profile: HardwareProfile | None) -> SimResult | None:
    if profile is None:
        return None
    one = reference.result
    return replace(reference.inputs, hardware=profile).simulate(one.strategy, one.stack)
