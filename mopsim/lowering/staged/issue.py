"""Issue: the builder of a pipeline stage's program."""

from mopsim.lowering.builder import Builder as Issue

__all__ = ["Issue"]
