"""Kernels of a chunked cross entropy. n: rows; V: of the vocabulary."""

from mopsim.program.context import Context
from mopsim.program.workload import Work, memory_work


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


def passes(c: Context, n: float, V: float) -> tuple[Work, Work]:
    """Those over a chunk's logits, forward and backward, as mopexec.operators.strips composes them: maximum,
    exponentials in the wide dtype and their sum; the gradient from the exponentials, in the logits' memory.
    """
    copied = 0 if c.b == c.wide else c.wide + c.b  # a wide strip is its own exponentials
    forward = memory_work(n * V * (2 * c.b + 4 * c.wide), 15)
    return forward, memory_work(n * V * (2 * c.wide + copied), 9)
