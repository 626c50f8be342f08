"""Which cluster, and how many nodes of it: time to train, cost, energy, and how sure."""

from mopsim.size.assumptions import assume
from mopsim.size.figures import Goal, Step, Terms, figures
from mopsim.size.points import Point, Request, Sizing
from mopsim.size.rounds import beside, size_all

__all__ = ["Goal", "Point", "Request", "Sizing", "Step", "Terms", "assume", "beside", "figures", "size_all"]
