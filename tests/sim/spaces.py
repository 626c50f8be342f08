"""Spaces of a search, multiplied out: whole, or in part all over them."""

from collections.abc import Callable

import numpy as np

from mopsim.search import Options, staged
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


def spread(asked: Problem, family: str) -> Space:
    """A family's space, of 400 rows of its trunk that lie all over it; nothing is guessed or bounded."""
    axes = axes_of(asked, family)
    first = trunk(asked, family, axes)
    rows = np.unique(np.linspace(0, len(first) - 1, 400).astype(int))
    return expanded(first.take(rows), axes)


def candidates(asked: Problem, family: str, most: int = Options.rows) -> tuple[Space, staged.Rest]:
    """Those of all axes of a family, and what was not multiplied out."""
    return staged.candidates(asked, family, axes_of(asked, family), most)
