"""Which cluster, and how many nodes of it: time to train, cost, energy, headroom."""

from mopsim.size.figures import Assumptions, Figures, Goal, figures
from mopsim.size.finder import Point, Sizing, size

__all__ = ["Assumptions", "Figures", "Goal", "Point", "Sizing", "figures", "size"]
