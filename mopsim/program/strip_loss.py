"""Projection and loss whose gradients are made beside it, a strip of logits at a time: with the whole head at
hand, or around a ring of vocabulary shards (Ring-DTP; mopexec.operators.loss, .strips)."""

from mopsim.graph.tape import Kernel, Matmul
from mopsim.program.builder import Builder
from mopsim.program.casts import Part
from mopsim.program.context import Context
from mopsim.program.pairs.rows import Rows
from mopsim.program.workload import Work, memory_work
from mopsim.program.works import works
from mopsim.spec.layout import ceil_div, ring_moves_weights, token_slices

_C, _L = "vocabulary", "logits"


def passes(c: Context, n: float, V: float) -> tuple[Work, Work]:
    """Those over n rows of logits, forward and backward, as mopexec.operators.strips composes them: maximum,
    exponentials in the wide dtype and their sum; the gradient from the exponentials, in the logits' memory.
    """
    copied = 0 if c.b == c.wide else c.wide + c.b  # a wide strip is its own exponentials
    forward = memory_work(n * V * (2 * c.b + 4 * c.wide), 15)
    return forward, memory_work(n * V * (2 * c.wide + copied), 9)


class StripLoss(Rows):
    """From `hidden` (the normed last output) to `grad`, its gradient; adds to the head's gradient buffer."""

    component = _C

    def __init__(self, context: Context, builder: Builder) -> None:
        super().__init__(context, builder)
        self.N, self.H, self.V = context.tokens, context.model.hidden_size, context.model.vocab_size
        self.P = context.strategy.vocabulary.vocab_parallel
        self.rows = ceil_div(self.V, self.P)
        self._made: dict[tuple[int, int, Part], tuple[Work, ...]] = {}
        self.slices = token_slices(self.N, context.strategy.vocabulary.chunk_tokens)

    def local(self, *waits: int | None) -> None:
        """All of the vocabulary at hand; forward and backward of a slice before the next."""
        b, c = self.b, self.c
        b.make("grad", c.hidden)
        for start, stop in self.slices:
            n = stop - start
            b.make("numbers", 3 * n * c.wide, _L)
            b.make("strip", n * self.V * c.b, _L)
            forward, backward = passes(c, n, self.V)
            exact = 0 if c.b == c.wide else n * self.V * c.wide
            b.spike(exact + 4 * n * c.wide, _L)
            b.compute("logits", _C, "forward", -1, [*self._works(n, self.V, "forward"), forward], *waits)
            b.spike(exact + 5 * n * 8, _L)
            self.weight_gradient(self.V * self.H, _L)
            b.compute("logits", _C, "backward", -1, [backward, *self._works(n, self.V, "backward")])
            b.drop("strip", "numbers")

    def ring(self, *waits: int | None) -> None:
        """Both passes around the ring."""
        weights = ring_moves_weights(self.N, self.V, self.P)
        self._fold_pass(weights, *waits)
        self.b.make("normaliser", self.N * self.c.wide, _L)
        self.b.spike(self.N * self.c.wide, _L)
        self.b.drop("fold")
        self._backward_pass(weights)
        self.b.drop("normaliser")

    def _fold_pass(self, weights: bool, *waits: int | None) -> None:
        """Forward: three numbers per token."""
        b, c = self.b, self.c
        b.make("fold", 3 * self.N * c.wide, _L)
        coming: int | None = None
        for turn in range(self.P):
            following = self._send(weights, turn, "forward", targets=8)
            for start, stop in self.slices:
                n = stop - start
                b.make("strip", n * self.rows * c.b, _L)
                works = [*self._works(n, self.rows, "forward"), self._fold(n, self.rows)]
                b.drop("strip")
                b.compute("strip", _C, "forward", -1, works, coming, *waits)
            coming = following
            if not weights:
                coming = self._pass_numbers(coming)
            self._next()
        self._last("forward")

    def _backward_pass(self, weights: bool) -> None:
        """Backward: the gradient of what moves travels with it and comes home."""
        b, c = self.b, self.c
        size = self.rows * self.H * c.reduce if weights else c.hidden
        if weights:
            b.make("grad", c.hidden)
        coming: int | None = None
        travelling: int | None = None
        for turn in range(self.P):
            following = self._send(weights, turn, "backward", targets=8 + c.wide)
            b.make("own", size, _L)
            for start, stop in self.slices:
                n = stop - start
                b.make("strip", n * self.rows * c.b, _L)
                works = [
                    *self._works(n, self.rows, "forward"),
                    self._gradient(n, self.rows),
                    *self._works(n, self.rows, "backward"),
                ]
                self.weight_gradient(self.rows * self.H, _L)
                b.drop("strip")
                b.compute("strip", _C, "backward", -1, works, coming)
            travelling = self._join(size, turn, travelling)
            coming = following
            self._next()
        self._last("backward")
        if not weights:
            b.make("grad", c.hidden)
        self._arrive(size, travelling)

    def _join(self, size: int, turn: int, travelling: int | None) -> int | None:
        """This place's part of the gradient that goes around is added to what has come, and sent on."""
        b, add = self.b, [Work("memory_bound", bytes=float(size * (3 if turn else 1)))]
        b.compute("join", self.component, "backward", -1, add, travelling)
        if turn:
            b.drop("incoming", "sent")
        b.make("incoming", size, _L)
        sent = b.issue("ring gradient", "send_recv", size, "vocabulary", self.component, "backward")
        b.rename("own", "sent")
        return sent

    def _arrive(self, size: int, travelling: int | None) -> None:
        """It has come home."""
        work = [Work("memory_bound", bytes=3.0 * size)]
        self.b.compute("arrive", self.component, "backward", -1, work, travelling)
        self.b.drop("incoming", "sent")

    def _send(self, weights: bool, turn: int, phase: str, targets: int) -> int | None:
        """The next round's block (or tokens), on its way."""
        if turn == self.P - 1:
            return None
        size = self.rows * self.H * self.c.b if weights else self.c.hidden + targets * self.N
        self.b.make("coming", size, _L)
        return self.b.issue("ring", "send_recv", size, "vocabulary", self.component, phase)

    def _next(self) -> None:
        """What has come takes the place of what was here."""
        b = self.b
        if "here" in b.alive:
            b.drop("here")
        if "coming" in b.alive:
            b.rename("coming", "here")

    def _last(self, phase: str) -> None:
        if "here" in self.b.alive:
            self.b.drop("here")
        self.b.flush(self.component, phase)

    def _pass_numbers(self, before: int | None) -> int | None:
        """The three numbers go on with their tokens."""
        b, size = self.b, 3 * self.N * self.c.wide
        b.make("numbers", size, _L)
        b.spike(size, _L)
        b.compute("numbers", _C, "forward", -1, [Work("memory_bound", bytes=2.0 * size)], before)
        b.drop("numbers")
        return b.issue("ring numbers", "send_recv", size, "vocabulary", _C, "forward")

    def _works(self, n: int, columns: int, part: Part) -> tuple[Work, ...]:
        """Equal strips are equal work."""
        key = n, columns, part
        if key not in self._made:
            kernel = Kernel("logits", "matmul", _C, (), (), matmuls=(Matmul(n, columns, self.H),))
            self._made[key] = works(kernel, part, self.c)
        return self._made[key]

    def _fold(self, n: int, columns: int) -> Work:
        """Maximum, exponentials in the wide dtype, sum: one wide strip."""
        wide = self.c.wide
        self.b.spike(n * columns * wide + 4 * n * wide, _L)
        return memory_work(float(n * columns * (2 * self.c.b + 4 * wide)), 18)

    def _gradient(self, n: int, columns: int) -> Work:
        """Probabilities in the wide dtype, then the gradient in the strip's memory."""
        wide = self.c.wide
        self.b.spike(n * columns * wide + 5 * n * 8, _L)
        return memory_work(float(n * columns * (2 * self.c.b + 6 * wide)), 10)
