"""Output projection and loss: rows of logits with the gathered head, or Ring-DTP (a ring over a sharded
vocabulary).

Every function takes normed hidden states [N, H] and returns (sum of the tokens' losses, gradient of hidden
scaled by `scale`), and adds to the head's gradient. The gradient of the moving tensor travels with it.
"""

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
        with component("vocabulary"), category("logits"):
            if self.moves_weights:
                fold = self._fold_moving_weights(hidden, targets, block)
                normaliser, total = fold.finish(targets)
                del fold
                with phase("backward"):
                    grad = self._backward_moving_weights(
                        hidden, targets, normaliser, block, grad_block, scale
                    )
            else:
                fold = self._fold_moving_activations(hidden, targets, block)
                normaliser, total = fold.finish(targets)
                del fold
                with phase("backward"):
                    grad = self._backward_moving_activations(
                        hidden, targets, normaliser, block, grad_block, scale
                    )
        return total, grad

    def _owner(self, round_: int) -> int:
        """Place whose tensor is here in a round (tensors move to the next place after each)."""
        return (self.group.place - round_) % self.group.size

    def _rows(self, place: int) -> int:
        start, stop = self.intervals[place]
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

    def _next_block(self, block: Tensor, round_: int) -> tuple[Tensor, collectives.Waitable] | None:
        """The next round's block, on its way; None in the last round."""
        if round_ == self.group.size - 1:
            return None
        received = torch.empty(
            (self._rows(self._owner(round_ + 1)), block.shape[1]), dtype=block.dtype, device=block.device
        )
        return received, self._hop([block], [received])

    def _fold_moving_weights(self, hidden: Tensor, targets: Tensor, block: Tensor) -> Fold:
        fold = Fold.empty(hidden.shape[0], hidden.dtype, hidden.device)
        for round_ in range(self.group.size):
            coming = self._next_block(block, round_)
            fold_block(fold, hidden, targets, block, self.intervals[self._owner(round_)][0], self.chunk)
            if coming is not None:
                coming[1].wait()
                block = coming[0]
        return fold

    def _backward_moving_weights(
        self,
        hidden: Tensor,
        targets: Tensor,
        normaliser: Tensor,
        block: Tensor,
        grad_block: Tensor,
        scale: float,
    ) -> Tensor:
        with category("activations"):
            grad_hidden = torch.zeros_like(hidden)
        travelling = _Travelling(self)
        for round_ in range(self.group.size):
            coming = self._next_block(block, round_)
            own = torch.zeros(block.shape, dtype=grad_block.dtype, device=block.device)
            first = self.intervals[self._owner(round_)][0]
            block_backward(hidden, targets, normaliser, block, first, scale, self.chunk, grad_hidden, own)
            next_rows = self._rows(self._owner(round_ + 1))
            travelling.join(own, (next_rows, block.shape[1]))
            del own
            if coming is not None:
                coming[1].wait()
                block = coming[0]
        travelling.arrive(grad_block)
        return grad_hidden

    def _fold_moving_activations(self, hidden: Tensor, targets: Tensor, block: Tensor) -> Fold:
        fold = Fold.empty(hidden.shape[0], hidden.dtype, hidden.device)
        first = self.intervals[self.group.place][0]
        for round_ in range(self.group.size):
            coming = self._next_tokens([hidden, targets], round_)
            fold_block(fold, hidden, targets, block, first, self.chunk)
            numbers = torch.stack((fold.maximum, fold.total, fold.target))
            received = torch.empty_like(numbers)
            self._hop([numbers], [received]).wait()
            fold = Fold(*received.unbind(0))
            if coming is not None:
                coming[1].wait()
                hidden, targets = coming[0]
        return fold

    def _backward_moving_activations(
        self,
        hidden: Tensor,
        targets: Tensor,
        normaliser: Tensor,
        block: Tensor,
        grad_block: Tensor,
        scale: float,
    ) -> Tensor:
        first = self.intervals[self.group.place][0]
        travelling = _Travelling(self)
        for round_ in range(self.group.size):
            coming = self._next_tokens([hidden, targets, normaliser], round_)
            own = torch.zeros_like(hidden)
            block_backward(hidden, targets, normaliser, block, first, scale, self.chunk, own, grad_block)
            travelling.join(own, tuple(own.shape))
            del own
            if coming is not None:
                coming[1].wait()
                hidden, targets, normaliser = coming[0]
        with category("activations"):
            grad_hidden = torch.zeros_like(hidden)
        travelling.arrive(grad_hidden)
        return grad_hidden

    def _next_tokens(
        self, tensors: list[Tensor], round_: int
    ) -> tuple[list[Tensor], collectives.Waitable] | None:
        """The next round's tokens, on their way; None in the last round."""
        if round_ == self.group.size - 1:
            return None
        received = [torch.empty_like(tensor) for tensor in tensors]
        return received, self._hop(tensors, received)


class _Travelling:
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
