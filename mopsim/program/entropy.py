"""Kernels of a chunked cross entropy. n: rows; V: of the vocabulary."""

from mopsim.program.context import Context
from mopsim.program.workload import Work


def product(c: Context, n: float, V: float) -> Work:
    """Logits of n rows."""
    return Work("matmul", m=n, n=V, k=c.model.hidden_size, dtype=c.strategy.precision.compute)


def back(c: Context, n: float, V: float) -> list[Work]:
    """Gradients of hidden states and of the head."""
    H, dtype = c.model.hidden_size, c.strategy.precision.compute
    return [Work("matmul", m=n, n=H, k=V, dtype=dtype), Work("matmul", m=V, n=H, k=n, dtype=dtype)]


def once(gradient: float) -> Work:
    """The head's gradient (bytes) of a chunked loss, zeroed before the chunks and scaled in the backward."""
    return Work("memory_bound", bytes=3 * gradient, launches=2)


def passes(c: Context, n: float, V: float, gradient: float) -> Work:
    """Those over a chunk's logits; the head's gradient is read to be added to."""
    return Work("memory_bound", bytes=n * V * (2 * c.b + 9 * c.wide) + gradient, launches=8)
