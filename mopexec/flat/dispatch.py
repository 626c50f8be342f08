"""One chunk's routes on their way: sorted by expert, sent to the experts' ranks, sorted there, and back
again.
"""

import torch
from torch import Tensor

from mopexec.distributed import collectives
from mopexec.distributed.mesh import Group
from mopexec.model.grouped import expert_order


class ChunkExchange:
    """All-to-all of one chunk's routes, both ways; routes are in the sender's order (by expert) or the
    expert's order.

    send[e]: routes to expert e of all; receive[r][e]: routes from rank r to local expert e. The sender's
    order is sorted by expert and so by rank; arrivals are sorted by rank, then expert, and reordered to
    expert, then rank, unless one of the two is alone. arrived [group, local]: `receive` on the device.
    """

    def __init__(self, group: Group, send: list[int], receive: list[list[int]], arrived: Tensor) -> None:
        self.group = group
        local = len(send) // group.size
        self.send_splits = [sum(send[r * local : (r + 1) * local]) for r in range(group.size)]
        self.receive_splits = [sum(counts) for counts in receive]
        self.num_sent, self.num_received = sum(self.send_splits), sum(self.receive_splits)
        self.counts = [sum(counts[e] for counts in receive) for e in range(local)]
        self._order = expert_order(arrived, self.num_received)

    def start(self, rows: Tensor) -> "Arrival":
        """Send rows [num_sent, ...] in the sender's order; the arrival is in the experts' order."""
        if self.group.size == 1:
            return Arrival(rows, None, None)
        arrived = torch.empty((self.num_received, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
        work = collectives.all_to_all_single(
            arrived, rows, self.receive_splits, self.send_splits, self.group.handle, async_op=True
        )
        return Arrival(arrived, work, self._order, rows)

    def start_back(self, owned: list[Tensor]) -> "Arrival":
        """Send the last of `owned`, rows [num_received, ...] in the experts' order, back to the sender's
        order.

        It is taken out of the list, so that it can be freed once it is reordered.
        """
        rows = owned.pop()
        if self.group.size == 1:
            return Arrival(rows, None, None)
        if self._order is not None:
            rows = torch.empty_like(rows).index_copy_(0, self._order, rows)
        arrived = torch.empty((self.num_sent, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
        work = collectives.all_to_all_single(
            arrived, rows, self.send_splits, self.receive_splits, self.group.handle, async_op=True
        )
        return Arrival(arrived, work, None, rows)


class Arrival:
    """Rows on their way. What is being sent is kept until `take`."""

    def __init__(
        self,
        rows: Tensor,
        work: collectives.Waitable | None,
        order: Tensor | None,
        sent: Tensor | None = None,
    ) -> None:
        self._rows: Tensor | None = rows
        self._work, self._order, self._sent = work, order, sent

    def take(self) -> Tensor:
        """The rows, waited for and reordered. Only once."""
        rows, self._rows = self._rows, None
        assert rows is not None
        if self._work is not None:
            self._work.wait()
        self._work = self._sent = None
        return rows if self._order is None else rows.index_select(0, self._order)
