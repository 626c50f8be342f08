"""Spaces of a search, multiplied out whole."""

from collections.abc import Callable

from mopsim.search.had import axes_of
from mopsim.search.legal import expanded, trunk
from mopsim.search.problem import Axes, Problem
from mopsim.search.space import Space


def generate(problem: Problem, family: str, change: Callable[[Problem, Axes], Axes] | None = None) -> Space:
    """All legal candidates of a family: the product of its axes (as `change` leaves them), less the rows that
    break a relation between two; what breaks one of the first axes is not multiplied by the others."""
    axes = axes_of(problem, family)
    axes = change(problem, axes) if change else axes
    return expanded(trunk(problem, family, axes), axes)
