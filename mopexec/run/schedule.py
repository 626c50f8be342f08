"""The learning rate of a step."""

import math
from collections.abc import Callable

from mopexec.run.options import Schedule
from mopsim.spec.plan import Plan


def learning_rate(plan: Plan, step: int, steps: int, schedule: Schedule) -> float:
    """Of step `step` (from 0): linear warm-up over plan.training.warmup_steps, then what `schedule` says,
    from the plan's rate to a tenth of it.
    """
    peak, warmup = plan.training.learning_rate, plan.training.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant" or steps <= warmup:
        return peak
    fraction = (step - warmup) / (steps - warmup)
    return peak * (0.1 + 0.9 * _LEFT[schedule](fraction))


_LEFT: dict[Schedule, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "wsd": lambda done: min(1.0, (1 - done) / 0.2),
}
"""Part of the fall that is left after a part of the steps; warm-up, stable, decay as in arXiv 2404.06395."""
