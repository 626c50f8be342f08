"""Routed experts as a three-stage pipeline of chunks: dispatch(i+1) | experts(i) | combine(i-1)."""

from mopsim.layers.experts import combine, dispatch, experts
from mopsim.layers.tape import Played, Tape
from mopsim.lowering.builder import Builder
from mopsim.lowering.context import Context
from mopsim.lowering.workload import Work


class Experts:
    """Lowers the routed experts of MoE layers on one program."""

    def __init__(self, context: Context, builder: Builder) -> None:
        self.context, self.builder = context, builder
        self.split = context.groups["experts"].size > 1
        self._tapes: dict[tuple[int, tuple[int, ...]], tuple[Tape, Tape, Tape]] = {}
        self._played: dict[tuple[int, tuple[int, ...], int, str], list[Played]] = {}

    def tapes(self, index: int) -> tuple[Tape, Tape, Tape]:
        """(dispatch, experts, combine) of chunk `index`."""
        context = self.context
        tokens, routes = context.chunk_tokens(index), context.routes(index)
        key = (tokens, routes)
        if key not in self._tapes:
            total = sum(routes)
            self._tapes[key] = (
                dispatch(context.model, tokens, total, context.b, context.wide, self.split),
                experts(context.model, routes, context.b, context.wide, context.strategy.experts.tensor),
                combine(context.model, tokens, total, context.b, self.split),
            )
        return self._tapes[key]

    def played(self, index: int, part: int, mode: str) -> list[Played]:
        """Part 0, 1 or 2 of a chunk as `plain`, `graph` or `backward`."""
        key = (self.context.chunk_tokens(index), self.context.routes(index), part, mode)
        if key not in self._played:
            tape = self.tapes(index)[part]
            self._played[key] = tape.backward() if mode == "backward" else tape.forward(mode == "graph")
        return self._played[key]

    def counts(self, layer: int, phase: str, deps: list[int]) -> int:
        """The exchange of route counts, once per layer."""
        size = 8.0 * self.context.model.num_local_experts * self.context.chunks
        group = self.context.groups["experts"]
        return self.builder.collective(
            "counts", "all_to_all", size, group, "router", phase, layer=layer, deps=deps
        )

    def forward(self, layer: int, phase: str, deps: list[int]) -> int:
        """All chunks forward without a graph; adds into the layer's output. Returns the last op."""
        ready = self.counts(layer, phase, deps)
        K = self.context.chunks
        last, sent = ready, [self.builder.play(self.played(0, 0, "plain"), phase, layer, [ready])]
        for i in range(K):
            if i + 1 < K:
                sent.append(self.builder.play(self.played(i + 1, 0, "plain"), phase, layer, [ready]))
            done = self.builder.play(self.played(i, 1, "plain"), phase, layer, [sent[i]])
            last = self.builder.play(self.played(i, 2, "plain"), phase, layer, [done])
        return last

    def backward(self, layer: int, deps: list[int]) -> int:
        """Chunk by chunk: inputs and output gradients dispatched, products recomputed, their backward,
        gradients returned."""
        K = self.context.chunks
        ready = [self.counts(layer, "backward", deps)]
        last, sent = ready[0], [self._dispatch_both(0, layer, ready)]
        for i in range(K):
            if i + 1 < K:
                sent.append(self._dispatch_both(i + 1, layer, ready))
            redo = self.builder.play(self.played(i, 1, "graph"), "recompute", layer, [sent[i]])
            values = self.tapes(i)[1].values
            back = self.builder.play(self.played(i, 1, "backward"), "backward", layer, [redo])
            last = self._return(i, layer, back, values["out"].bytes)
        return last

    def _dispatch_both(self, i: int, layer: int, deps: list[int]) -> int:
        """Tokens and the gradients of their results, one after the other."""
        self.builder.play(self.played(i, 0, "plain"), "backward", layer, deps)
        return self.builder.play(self.played(i, 0, "plain"), "backward", layer, deps)

    def _return(self, i: int, layer: int, after: int, out: int) -> int:
        """Row gradients back to the tokens' ranks; the recomputed output is freed."""
        free = self.builder.add(
            "output freed",
            "compute",
            "experts",
            "backward",
            layer=layer,
            deps=[after],
            memory=[("dispatch", -out)],
        )
        last = self.builder.play(self.played(i, 2, "plain"), "backward", layer, [free])
        row = self.context.model.hidden_size * self.context.b
        work = (Work("memory_bound", bytes=2.0 * row * self.context.chunk_tokens(i)),)
        return self.builder.add(
            "gradients added", "compute", "experts", "backward", work, layer=layer, deps=[last]
        )
