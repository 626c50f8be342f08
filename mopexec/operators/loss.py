"""Output projection and loss: rows of logits with the gathered head, or Ring-DTP (a ring over a sharded
vocabulary).

Every function takes normed hidden states [N, H] and returns (sum of the tokens' losses, gradient of hidden
scaled by `scale`), and adds to the head's gradient. The gradient of the moving tensor travels with it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mopexec.distributed import collectives
from mopexec.distributed.mesh import Group
from mopexec.measure.tracker import category, component, phase
from mopexec.operators.dtypes import wide
from mopexec.operators.rows import add_matmul
from mopexec.operators.strips import Fold, block_backward, fold_block, whole_backward_, whole_forward
from mopsim.spec import layout

Result = tuple[Tensor, Tensor]


def chunked_loss(
    hidden: Tensor, targets: Tensor, head: Tensor, grad_head: Tensor, scale: float, chunk: int,
    gradients: str = "backward",
) -> Result:  # fmt: skip
    """All of the vocabulary at hand: forward and backward of `chunk` rows of logits (0 = all) before the next
    ones, three products each. gradients: the phase that their backward is booked in.
    """
    with component("vocabulary"), category("logits"):
        total = torch.zeros((), dtype=wide(hidden.dtype), device=hidden.device)
        with category("activations"):
            grad_hidden = torch.empty_like(hidden)
        for start, stop in layout.token_slices(hidden.shape[0], chunk):
            rows, wanted = hidden[start:stop], targets[start:stop]
            strip = rows @ head.t()
            loss, exact, sums = whole_forward(strip, wanted)
            total.add_(loss)
            with phase(gradients):
                whole_backward_(strip, exact, sums, wanted, scale)
                del exact
                torch.mm(strip, head, out=grad_hidden[start:stop])
                add_matmul(grad_head, strip.t(), rows)
                del strip
        return total, grad_hidden


class Ring:
    """Ring-DTP over `group`: place p holds vocabulary rows `interval(V, P, p)` and its own tokens (arXiv
    2609.14306).

    chunk: tokens whose strip is formed at a time (0 = all). What moves is prefetched one round ahead;
    gradients that travel are sent while the next round computes.
    """

    def __init__(self, group: Group, vocab_size: int, chunk: int, *, moves_weights: bool) -> None:
        self.group, self.chunk, self.moves_weights = group, chunk, moves_weights
        self.intervals = [layout.interval(vocab_size, group.size, place) for place in range(group.size)]

    def loss(
        self, hidden: Tensor, targets: Tensor, block: Tensor, grad_block: Tensor, scale: float
    ) -> Result:
        """Both passes around the ring. block [rows of this place, H] and its gradient; targets [N] of the
        whole V.
        """
        fold_all, backward = (
            (self._fold_moving_weights, self._backward_moving_weights)
            if self.moves_weights
            else (self._fold_moving_activations, self._backward_moving_activations)
        )
        with component("vocabulary"), category("logits"):
            fold = fold_all(hidden, targets, block)
            normaliser, total = fold.finish(targets)
            del fold
            with phase("backward"):
                grad = backward(hidden, targets, normaliser, block, grad_block, scale)
        return total, grad

    def _rows(self, round_: int) -> tuple[int, int]:
        """The vocabulary rows that are here in a round; where weights move, to the next place after each."""
        return self.intervals[(self.group.place - round_ * self.moves_weights) % self.group.size]

    def _count(self, round_: int) -> int:
        start, stop = self._rows(round_)
        return stop - start

    def _hop(self, send: list[Tensor], receive: list[Tensor]) -> collectives.Waitable:
        """Everything one place on, asynchronously (a ring of one is its own neighbour)."""
        if self.group.size == 1:
            for target, source in zip(receive, send, strict=True):
                target.copy_(source)
            send, receive = [], []
        return collectives.send_recv(
            send, self.group.next, receive, self.group.previous, self.group.handle, async_op=True
        )

    def _rounds(self, tensors: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """(round, the tensors that travel) of every round; those of the next are on their way meanwhile. Drop
        a round's before asking for the next.
        """
        for round_ in range(self.group.size):
            coming, work = None, None
            if round_ < self.group.size - 1:
                rows = self._count(round_ + 1) if self.moves_weights else tensors[0].shape[0]
                coming = [tensor.new_empty((rows, *tensor.shape[1:])) for tensor in tensors]
                work = self._hop(tensors, coming)
            yield round_, tensors
            if coming is not None and work is not None:
                work.wait()
                tensors = coming

    def _fold_moving_weights(self, hidden: Tensor, targets: Tensor, block: Tensor) -> Fold:
        fold = Fold.empty(hidden.shape[0], hidden.dtype, hidden.device)
        for round_, (here,) in self._rounds([block]):
            fold_block(fold, hidden, targets, here, self._rows(round_)[0], self.chunk)
            del here
        return fold

    def _backward_moving_weights(
        self, hidden: Tensor, targets: Tensor, normaliser: Tensor, block: Tensor, grad_block: Tensor,
        scale: float,
    ) -> Tensor:  # fmt: skip
        with category("activations"):
            grad_hidden = torch.zeros_like(hidden)
        travelling = Travelling(self)
        for round_, (here,) in self._rounds([block]):
            own, first = torch.zeros_like(here, dtype=grad_block.dtype), self._rows(round_)[0]
            block_backward(hidden, targets, normaliser, here, first, scale, self.chunk, grad_hidden, own)
            travelling.join(own, (self._count(round_ + 1), here.shape[1]))
            del own, here
        travelling.arrive(grad_block)
        return grad_hidden

    def _fold_moving_activations(self, hidden: Tensor, targets: Tensor, block: Tensor) -> Fold:
        fold = Fold.empty(hidden.shape[0], hidden.dtype, hidden.device)
        for _, (here, wanted) in self._rounds([hidden, targets]):
            fold_block(fold, here, wanted, block, self._rows(0)[0], self.chunk)
            numbers = torch.stack((fold.maximum, fold.total, fold.target))
            received = torch.empty_like(numbers)
            self._hop([numbers], [received]).wait()
            fold = Fold(*received.unbind(0))
            del here, wanted
        return fold

    def _backward_moving_activations(
        self, hidden: Tensor, targets: Tensor, normaliser: Tensor, block: Tensor, grad_block: Tensor,
        scale: float,
    ) -> Tensor:  # fmt: skip
        first, travelling = self._rows(0)[0], Travelling(self)
        for _, (here, wanted, sums) in self._rounds([hidden, targets, normaliser]):
            own = torch.zeros_like(here)
            block_backward(here, wanted, sums, block, first, scale, self.chunk, own, grad_block)
            travelling.join(own, tuple(own.shape))
            del own, here, wanted, sums
        with category("activations"):
            grad_hidden = torch.zeros_like(hidden)
        travelling.arrive(grad_hidden)
        return grad_hidden


class Travelling:
    """A gradient that goes around the ring with its tensor, each place adding its own part, and
    comes home.
    """

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._coming: tuple[Tensor, collectives.Waitable, Tensor] | None = None

    def join(self, own: Tensor, next_shape: tuple[int, ...]) -> None:
        """Add this place's part of this round to what has arrived, and send it on; `next_shape`
        arrives next.
        """
        self._take(own)
        incoming = torch.empty(next_shape, dtype=own.dtype, device=own.device)
        self._coming = (incoming, self._ring._hop([own], [incoming]), own)

    def arrive(self, target: Tensor) -> None:
        """target += the gradient that has come home."""
        self._take(target)

    def _take(self, target: Tensor) -> None:
        if self._coming is not None:
            incoming, work, _ = self._coming
            self._coming = None
            work.wait()
            target.add_(incoming)
