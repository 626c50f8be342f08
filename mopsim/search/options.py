"""What is asked of a search."""

from collections.abc import Callable
from dataclasses import dataclass

from mopsim.common.errors import require_at_least
from mopsim.search.problem import Axes, Problem
from mopsim.spec.stack import Stack
from mopsim.spec.strategy import MatmulDType
from mopsim.strategies import FAMILIES


@dataclass(frozen=True)
class Options:
    """top: how many are ranked. budget: simulations at most of each family; prove: up to PROOFS times as many
    where these prove what was found. runnable: only what mopexec runs.

    risk: rank plans that fit, as described, with a probability below SURE like the others;
    otherwise they are ranked only where nothing else fits. any_routing: rank only what fits however unevenly
    the router chooses, up to every token of an expert-parallel group on one rank. axes: what makes of a
    family's axes those that are searched: fewer values, or more (`mopsim.search.coarse`, `mopsim.context`).
    rows: to which a family's space is multiplied out, those that promise most; the others keep a bound.
    stack: the software of all families, where it is not each one's own. jobs: families searched side by side,
    a process each, where it is more than one; what they find is the same.
    """

    families: tuple[str, ...] = FAMILIES
    top: int = 5
    budget: int = 100
    runnable: bool = False
    risk: bool = False
    any_routing: bool = False
    precision: MatmulDType = "bfloat16"
    axes: Callable[[Problem, Axes], Axes] | None = None
    rows: int = 400_000
    stack: Stack | None = None
    jobs: int = 1
    prove: bool = False

    def __post_init__(self) -> None:
        require_at_least(self, 1, "top", "budget", "rows", "jobs")
