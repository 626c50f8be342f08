"""Context length against throughput: each contender's best strategy at every length, until none fits."""

from mopsim.context.contenders import Contender, contenders
from mopsim.context.sweep import ContextCase, ContextPoint, Curve, Task, nested, sweep, totals

__all__ = [
    "Contender",
    "ContextCase",
    "ContextPoint",
    "Curve",
    "Task",
    "contenders",
    "nested",
    "sweep",
    "totals",
]
