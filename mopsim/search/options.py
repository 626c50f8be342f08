"""How a search looks for what is asked."""

from collections.abc import Callable
from dataclasses import dataclass

from mopsim.common.errors import require, require_at_least
from mopsim.engine import SimResult
from mopsim.intervals.spread import HIGHEST_LEVEL
from mopsim.search.problem import Axes, Problem
from mopsim.strategies import FAMILIES


@dataclass(frozen=True)
class Options:
    """top: how many are ranked. budget: simulations at most of each family. prove: refine more bounds
    where that may prove what was found, and try the best without what a user may rule out.

    risk: rank plans that fit, as described, with a probability below SURE like the others;
    otherwise they are ranked only where nothing else fits. confidence: P(fits) that is asked for beside that,
    which allows for a program that is not as described; 0: none. any_routing: rank only what fits however
    unevenly the router chooses, up to every token of an expert-parallel group on one rank. axes: what makes
    of a family's axes those that are searched: fewer values, or more (`mopsim.search.coarse`,
    `mopsim.context`).
    rows: to which a family's space is multiplied out, those that promise most; the others keep a bound.
    jobs: families searched side by side, a process each, where it is more than one; what they find is the
    same. nearest: of a family of which nothing may fit, simulate what misses by least.
    """

    families: tuple[str, ...] = FAMILIES
    top: int = 5
    budget: int = 100
    risk: bool = False
    confidence: float = 0.0
    any_routing: bool = False
    axes: Callable[[Problem, Axes], Axes] | None = None
    rows: int = 400_000
    jobs: int = 1
    prove: bool = False
    nearest: bool = True

    def __post_init__(self) -> None:
        require_at_least(self, 1, "top", "budget", "rows", "jobs")
        rule = f"must lie between 0 and {HIGHEST_LEVEL}"
        require(0 <= self.confidence <= HIGHEST_LEVEL, "confidence", self.confidence, rule)
        require(
            not (self.risk and self.confidence),
            "confidence",
            self.confidence,
            "cannot be asked for with --risk",
        )

    def takes(self, one: SimResult) -> bool:
        """Whether a plan is ranked before those that may not fit."""
        return self.risk or (one.sure and one.p_fits >= self.confidence)
