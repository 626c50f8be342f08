"""What a predicted step is made of, as far as its error goes."""

from collections.abc import Mapping

from mopsim.spec.categories import STEP_PARTS, WAITING_PARTS

ALWAYS = "always"
"""Beside the parts: what every step has, whatever it is made of."""
Made = tuple[float, ...]
"""Shares of a step, in the order of STEP_PARTS; empty where it is not known."""


def made_of(step: float, busy: Mapping[str, float], exposed: Mapping[str, float]) -> Made:
    """Shares of a step of so many seconds that are waits, and of kernels in the rest of it as in their busy
    seconds: what a stage waits for its peers is made of what they do."""
    found = {part: exposed if part in WAITING_PARTS else busy for part in STEP_PARTS}
    seconds = {part: sum(some.get(kind, 0.0) for kind in STEP_PARTS[part]) for part, some in found.items()}
    waits = sum(seconds[part] for part in WAITING_PARTS)
    rest = max(0.0, step - waits) / (sum(seconds.values()) - waits or 1.0)
    shares = {part: one / step * (1.0 if part in WAITING_PARTS else rest) for part, one in seconds.items()}
    return tuple(round(min(1.0, shares[part]), 4) for part in STEP_PARTS)
