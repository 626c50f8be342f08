"""Packed rows that context-parallel ranks exchange (HostCosts.orders_documents)."""

from mopsim.program.context import Context
from mopsim.spec.documents import number


def ordered_pieces(context: Context) -> float:
    """Pieces of a microbatch's documents that the host puts in order; 0: none, or not known."""
    attention, training, host = context.strategy.attention, context.training, context.stack.host
    ranks = attention.context_parallel * (attention.cp_comm_type == "ulysses")
    if ranks < 2 or not training.document_tokens or not host.orders_documents:
        return 0.0
    each = max(host.documents, number(training.document_tokens, training.seq_len))
    return 2 * ranks * context.strategy.micro_batch * each
