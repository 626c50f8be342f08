"""What a predicted step is made of, as far as its error goes."""

from collections.abc import Mapping

from mopsim.spec.categories import STEP_PARTS, WAITING_PARTS
from mopsim.spec.hardware import COMPUTE_KINDS

ALWAYS = "always"
"""Beside the parts: what every step has, whatever it is made of."""
Made = tuple[float, ...]
"""Shares of a step, in the order of STEP_PARTS; empty where it is not known."""


def made_of(step: float, busy: Mapping[str, float], exposed: Mapping[str, float]) -> Made:
    """Shares of a step of so many seconds that are waits, and of kernels in the rest of it as in their busy
    seconds: what a stage waits for its peers is made of what they do."""
    waits = {part: sum(exposed.get(kind, 0.0) for kind in STEP_PARTS[part]) for part in WAITING_PARTS}
    kernels = divided(max(0.0, step - sum(waits.values())), busy)
    seconds = {
        part: sum(kernels.get(kind, 0.0) for kind in kinds) for part, kinds in STEP_PARTS.items()
    } | waits
    return tuple(round(min(1.0, seconds[part] / step), 4) for part in STEP_PARTS)


def divided(rest: float, busy: Mapping[str, float]) -> dict[str, float]:
    """Seconds between kinds of compute, as their busy seconds are to each other; empty where none is busy."""
    kernels = {kind: busy.get(kind, 0.0) for kind in COMPUTE_KINDS}
    total = sum(kernels.values())
    return {kind: rest * seconds / total for kind, seconds in kernels.items()} if total else {}
