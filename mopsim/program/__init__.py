"""Model, strategy and stack -> Workload: ops with stream, work, dependencies and memory."""

from mopsim.program.lower import lower
from mopsim.program.workload import CommGroup, Op, Program, Work, Workload

__all__ = ["CommGroup", "Op", "Program", "Work", "Workload", "lower"]
