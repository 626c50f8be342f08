"""Streams on a clock of discrete events and the memory ledger: Workload -> SimResult."""

from mopsim.engine.record import Span
from mopsim.engine.result import SimResult
from mopsim.engine.simulate import run, simulate

__all__ = ["SimResult", "Span", "run", "simulate"]
