"""Layers x Strategy -> Workload: ops with stream, work, dependencies and memory."""

from mopsim.lowering.lower import lower
from mopsim.lowering.workload import Group, Op, Program, Work, Workload

__all__ = ["Group", "Op", "Program", "Work", "Workload", "lower"]
