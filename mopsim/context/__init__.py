"""Context length against throughput: each contender's best strategy at every length, until none fits."""

from mopsim.context.contenders import Contender, contenders
from mopsim.context.sweep import Case, Curve, Point, Task, nested, sweep, totals

__all__ = ["Case", "Contender", "Curve", "Point", "Task", "contenders", "nested", "sweep", "totals"]
