"""One chunk's routes on their way: sorted by expert, sent to the experts' ranks, sorted there, and back
again. A route's row and weight travel together, packed (`fused.split_packed`).
"""

import torch
from torch import Tensor

from mopexec.distributed import collectives
from mopexec.distributed.mesh import Group
from mopexec.operators.fused import OPS, split_packed
from mopexec.operators.grouped import expert_order
from mopexec.operators.routes import Routes


def to_ranks(
    rows: Tensor, received: list[int], sent: list[int], group: Group, *, async_op: bool = False
) -> tuple[Tensor, collectives.Waitable]:
    """Contiguous row blocks to the ranks of the group, `sent` rows to each; (`received` rows of each, what to
    wait for where async_op).
    """
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    work = collectives.all_to_all_single(arrived, rows, received, sent, group.handle, async_op)
    return arrived, work


def sum_routes(rows: Tensor, places: Tensor, top_k: int) -> Tensor:
    """Each token's sum over its routes, [n, H], of rows [R, H]; places [n * top_k]. In a fixed order, unlike
    a scatter.
    """
    return rows.index_select(0, places).view(-1, top_k, rows.shape[1]).sum(1)


class ChunkExchange:
    """All-to-all of one chunk's routes, both ways; routes are in the sender's order (by expert) or the
    expert's order.

    send[e]: routes to expert e of all; receive[r][e]: routes from rank r to local expert e. The sender's
    order is sorted by expert and so by rank; arrivals are sorted by rank, then expert, and reordered to
    expert, then rank, unless one of the two is alone: arrivals [received], their places. order: this
    rank's routes (token, slot) as they are sent; inverse: where each went.
    """

    def __init__(
        self, group: Group, send: list[int], receive: list[list[int]], arrivals: Tensor | None,
        order: Tensor, inverse: Tensor,
    ) -> None:  # fmt: skip
        self.group, self.order, self.inverse, self._arrivals = group, order, inverse, arrivals
        local = len(send) // group.size
        self.send_splits = [sum(send[r * local : (r + 1) * local]) for r in range(group.size)]
        self.receive_splits = [sum(counts) for counts in receive]
        self.counts = [sum(counts[e] for counts in receive) for e in range(local)]

    @classmethod
    def of(cls, group: Group, routes: Routes) -> "list[ChunkExchange]":
        """Those of all chunks of a layer: their orders are found at once."""
        chunks = len(routes.send)
        received = [sum(map(sum, receive)) for receive in routes.receive]
        arrivals = expert_order(routes.arrived, sum(received))
        each = (None,) * chunks if arrivals is None else arrivals.split(received)  # type: ignore[no-untyped-call]
        orders = (one.split([sum(sent) for sent in routes.send]) for one in routes.orders())  # type: ignore[no-untyped-call]
        return [cls(group, *of) for of in zip(routes.send, routes.receive, each, *orders, strict=True)]

    def start(self, rows: Tensor) -> "Arrival":
        """Send rows [sent, ...] in the sender's order; the arrival is in the experts' order."""
        if self.group.size == 1:
            return Arrival(rows)
        arrived, work = to_ranks(rows, self.receive_splits, self.send_splits, self.group, async_op=True)
        return Arrival(arrived, work, rows, order=self._arrivals)

    def start_back(self, owned: list[Tensor], weights: Tensor | None = None) -> "Arrival":
        """Send the last of `owned`, rows [received, H] in the experts' order, and a number of each where
        given, back to the sender's order.

        It is taken out of the list, so that it can be freed once it is reordered.
        """
        rows = owned.pop()
        if self.group.size == 1:
            return Arrival(rows, weights=weights)
        hidden = 0
        if weights is not None:
            hidden, rows = rows.shape[1], OPS.pack_back(rows, weights, self._arrivals)
        elif self._arrivals is not None:
            rows = torch.empty_like(rows).index_copy_(0, self._arrivals, rows)
        rows = rows.contiguous()
        arrived, work = to_ranks(rows, self.send_splits, self.receive_splits, self.group, async_op=True)
        return Arrival(arrived, work, rows, hidden=hidden)


class Arrival:
    """Rows on their way. What is being sent is kept until `take`. weights: beside them; hidden: where they
    are packed, the width of the rows."""

    def __init__(
        self, rows: Tensor, work: collectives.Waitable | None = None, sent: Tensor | None = None, *,
        order: Tensor | None = None, weights: Tensor | None = None, hidden: int = 0,
    ) -> None:  # fmt: skip
        self._rows: Tensor | None = rows
        self._work, self._order, self._sent = work, order, sent
        self._weights, self._hidden = weights, hidden

    def take(self) -> Tensor:
        """The rows, waited for and reordered. Only once."""
        rows, self._rows = self._rows, None
        assert rows is not None
        if self._work is not None:
            self._work.wait()
        self._work = self._sent = None
        return rows if self._order is None else rows.index_select(0, self._order)

    def take_weighted(self) -> tuple[Tensor, Tensor]:
        """The rows and their weights. Only once."""
        taken = self.take()
        if self._weights is not None:
            weights, self._weights = self._weights, None
            return taken, weights
        return split_packed(taken, self._hidden)
