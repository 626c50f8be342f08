"""Context length against throughput: each contender's best strategy at every length, until none fits."""

from mopsim.context.contenders import CONTENDERS, Contender
from mopsim.context.sweep import Case, Curve, Point, Task, nested, sweep
from mopsim.context.variants import VARIANTS, Variant

__all__ = [
    "CONTENDERS",
    "VARIANTS",
    "Case",
    "Contender",
    "Curve",
    "Point",
    "Task",
    "Variant",
    "nested",
    "sweep",
]
