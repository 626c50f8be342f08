"""Which cluster, and how many nodes of it: time to train, cost, energy, and how sure."""

from mopsim.size.assumptions import Assumptions, Site, assume
from mopsim.size.figures import Figures, Goal, Step, Terms, figures
from mopsim.size.points import Point, Request, Sizing
from mopsim.size.rounds import beside, size_all

__all__ = [
    "Assumptions",
    "Figures",
    "Goal",
    "Point",
    "Request",
    "Site",
    "Sizing",
    "Step",
    "Terms",
    "assume",
    "beside",
    "figures",
    "size_all",
]
