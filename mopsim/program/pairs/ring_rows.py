"""Words looked up where the vocabulary is whole, or around the ring that it is split over
(mopexec.operators.ring_rows)."""

from mopsim.program.builder import Builder
from mopsim.program.context import Context
from mopsim.program.pairs.rows import slice_rows
from mopsim.program.strip_loss import StripLoss
from mopsim.program.workload import Work
from mopsim.spec.layout import ring_moves_weights

_C, _L = "embedding", "logits"


def look_up(c: Context, b: Builder, name: str, *waits: int | None) -> None:
    """Makes `name`, rows of the embedding."""
    if _splits_rows(c):
        RingRows(c, b).look_up(name, *waits)
        return
    b.make(name, c.hidden)
    b.compute("embedding", _C, "forward", -1, [Work("memory_bound", bytes=2.0 * c.hidden)], *waits)


def add_rows(c: Context, b: Builder, *waits: int | None) -> None:
    """Gradients of tokens are added to those of the embedding's rows, slice by slice."""
    if _splits_rows(c):
        RingRows(c, b).add_rows(*waits)
        return
    if c.reduce != c.b:
        b.spike(slice_rows(c.tokens) * c.model.hidden_size * c.reduce)
    b.compute("embedding", _C, "backward", -1, [Work("memory_bound", bytes=3.0 * c.hidden)], *waits)


def _splits_rows(c: Context) -> bool:
    """Whether ranks of a ring split the embedding, which is the head too."""
    return c.strategy.vocabulary.loss == "ring" and c.model.tie_word_embeddings


class RingRows(StripLoss):
    """Rows of the block that is here for all of a rank's tokens, or of this rank's block for tokens of every
    rank, masked where they are another block's."""

    component = _C

    def __init__(self, context: Context, builder: Builder) -> None:
        super().__init__(context, builder)
        self.moves = ring_moves_weights(self.N, self.V, self.P)

    def look_up(self, name: str, *waits: int | None) -> None:
        """Makes `name`."""
        b, hidden = self.b, self.c.hidden
        b.make(name, hidden)
        coming: int | None = None
        for turn in range(self.P):
            following = self._send(True, turn, "forward", targets=0) if self.moves else None
            self._masked(self.c.b)
            work = self.pass_(self.N, self.H, 7 * self.c.b, 8)
            b.compute("embedding", _C, "forward", -1, [work], coming, *(waits if turn == 0 else ()))
            if self.moves:
                self._next()
            else:
                b.make("coming", hidden)
                b.make("ids", 8 * self.N, _L)
                following = b.issue("ring", "send_recv", hidden + 8 * self.N, "vocabulary", _C, "forward")
                b.drop(name, "ids")
                b.rename("coming", name)
            coming = following
        self._last("forward")
        if coming is not None:
            b.compute("embedding", _C, "forward", -1, [], coming)

    def add_rows(self, *waits: int | None) -> None:
        """Adds to the block's gradient."""
        b, c, size = self.b, self.c, self.rows * self.H * self.c.reduce
        coming: int | None = None
        travelling: int | None = None
        for turn in range(self.P):
            following = None
            if self.moves:
                b.make("own", size, _L)
            else:
                following = self._send(False, turn, "backward", targets=8)
            self._masked(c.b + c.reduce * (c.reduce != c.b))
            works = [self.pass_(self.N, self.H, 2 * c.b + 3 * c.reduce, 8)]
            works += [Work("memory_bound", bytes=float(size))] * self.moves
            b.compute("embedding", _C, "backward", -1, works, coming, *(waits if turn == 0 else ()))
            if self.moves:
                travelling = self._join(size, turn, travelling)
            coming = following
            self._next()
        self._last("backward")
        if self.moves:
            self._arrive(size, travelling)

    def _masked(self, each: float) -> None:
        """What a slice of rows is where those of other blocks are left out."""
        self.b.spike(slice_rows(self.N) * self.H * each, _L)
