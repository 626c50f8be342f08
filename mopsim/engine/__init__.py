"""SimPy streams and the memory ledger: Workload -> SimResult. The only importer of simpy."""

from mopsim.engine.record import Span
from mopsim.engine.result import SimResult
from mopsim.engine.simulate import run, simulate

__all__ = ["SimResult", "Span", "run", "simulate"]
