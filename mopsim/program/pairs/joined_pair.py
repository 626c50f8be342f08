"""What is before the layer of an MTP module (mopexec.operators.joined_inputs): a lookup, norms, a
projection in two products."""

from mopsim.graph.tape import Kernel, Matmul
from mopsim.program.builder import Recorder
from mopsim.program.casts import Part
from mopsim.program.context import Context
from mopsim.program.pairs.ring_rows import look_up
from mopsim.program.pairs.rows import Rows
from mopsim.program.workload import Work
from mopsim.program.works import works

_C = "vocabulary"


class JoinedPair(Rows):
    """The layer's input from hidden states and embeddings; both stay."""

    def __init__(self, context: Context, builder: Recorder) -> None:
        super().__init__(context, builder)
        self.recorder = builder
        self.N, self.H = context.tokens, context.model.hidden_size

    def _product(self, part: Part) -> list[Work]:
        """One half of the projection."""
        shape = (Matmul(self.N, self.H, self.H),)
        kernel = Kernel("mtp_projection", "matmul", _C, (), (), matmuls=shape)
        return list(works(kernel, part, self.c))

    def forward(self, *waits: int | None) -> None:
        """Makes `embedded`, which stays, and the layer's input."""
        b, N, H, hidden = self.b, self.N, self.H, self.c.hidden
        look_up(self.c, b, "embedded", *waits)
        self.recorder.cut("embedded")
        found = [self.norm(N, H, "hidden"), self.norm(N, H, "normed")]
        b.make("z", hidden)
        found += self._product("forward")
        b.drop("normed")
        found += [self.norm(N, H, "normed"), *self._product("forward")]
        b.compute("joined", _C, "forward", -1, found)
        b.drop("hidden", "normed")

    def backward(self, layer: int) -> None:
        """`grad`, of the layer's input, becomes that of the embeddings, in place; that of the hidden states
        is added to theirs."""
        b, N, H = self.b, self.N, self.H
        found: list[Work] = []
        inner, outer = self._product("input_grad"), self._product("weight_grad")
        for first in (True, False):
            found += [self.norm(N, H, "hidden")] if first else []
            found.append(self.norm(N, H, "normed"))
            self.weight_gradient(H * H)
            b.drop("normed")
            b.make("found", self.c.hidden)
            found += [*outer, *inner, self.norm_backward(N, H)]
            b.drop("found", *(("hidden",) if first else ()))
        b.compute("joined", _C, "backward", layer, found)
        b.adopt("embedded", self.c.hidden)
        b.drop("embedded")
