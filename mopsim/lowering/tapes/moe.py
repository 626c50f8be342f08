"""Routed experts as a three-stage pipeline of chunks: dispatch(i+1) | experts(i) | combine(i-1).

A chunk's buffers that outlive an op are named: `arrived.i` (rows as they came), `kept.i` (what a graph keeps).
"""

from dataclasses import replace

from mopsim.layers.experts import combine, dispatch, experts, migration, on_packed
from mopsim.layers.tape import Played, Tape, Value
from mopsim.lowering.builder import Builder
from mopsim.lowering.context import Context
from mopsim.lowering.workload import Work

_E = "experts"


class Experts:
    """Lowers the routed experts of MoE layers on one program."""

    def __init__(self, context: Context, builder: Builder) -> None:
        self.context, self.builder = context, builder
        self.split = context.groups["experts"].size > 1
        moved = context.migration if self.split else None
        self.moving = migration(moved) if moved else None
        self._tapes: dict[tuple[int, tuple[int, ...]], tuple[Tape, Tape, Tape]] = {}
        self._played: dict[tuple[int, tuple[int, ...], int, str], list[Played]] = {}

    def tapes(self, index: int) -> tuple[Tape, Tape, Tape]:
        """(dispatch, experts, combine) of chunk `index`."""
        context = self.context
        tokens, routes = context.chunk_tokens(index), context.routes(index)
        key = (tokens, routes)
        if key not in self._tapes:
            total = sum(routes)
            products = experts(
                context.model, routes, context.b, context.wide, context.strategy.experts.tensor
            )
            if self.moving:
                inputs = (*products.inputs, self.moving.values["packed"])
                products = replace(products, inputs=inputs, kernels=on_packed(products.kernels))
            self._tapes[key] = (
                dispatch(context.model, tokens, total, context.b, context.wide, self.split),
                products,
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

    def _gather_moved(self, layer: int, phase: str, ready: int) -> list[int]:
        """Weights of moved experts arrive; what the products wait for."""
        if self.moving is None:
            return []
        last = self.builder.play(self.moving.forward(graph=True), phase, layer, [ready])
        for name in ("migrated", "packed"):
            self.builder.adopt(name, self.moving.values[name].bytes, "gathered")
        return [last]

    def _return_moved(self, layer: int, after: int) -> int:
        """Gradients of moved experts go home; the weights are freed."""
        if self.moving is None:
            return after
        last = self.builder.play(self.moving.backward(), "backward", layer, [after])
        del self.builder.alive["packed gradient"]
        self._free_moved()
        return last

    def _free_moved(self) -> None:
        if self.moving:
            self.builder.drop("migrated", "packed")

    def forward(self, layer: int, phase: str, deps: list[int]) -> int:
        """All chunks forward without a graph; adds into the layer's output. Returns the last op."""
        ready = self.counts(layer, phase, deps)
        there = self._gather_moved(layer, phase, ready)
        K = self.context.chunks
        last, sent = ready, [self.builder.play(self.played(0, 0, "plain"), phase, layer, [ready])]
        for i in range(K):
            if i + 1 < K:
                sent.append(self.builder.play(self.played(i + 1, 0, "plain"), phase, layer, [ready]))
            done = self.builder.play(self.played(i, 1, "plain"), phase, layer, [sent[i], *there])
            last = self.builder.play(self.played(i, 2, "plain"), phase, layer, [done])
        self._free_moved()
        return last

    def forward_kept(self, layer: int, phase: str, deps: list[int]) -> int:
        """All chunks forward, ready for `backward_kept`: of one chunk every intermediate is kept, of several
        what arrived for each, beside which its products are a checkpoint. Returns the last op."""
        b, K = self.builder, self.context.chunks
        ready = self.counts(layer, phase, deps)
        there = self._gather_moved(layer, phase, ready)
        last, sent = ready, [b.play(self.played(0, 0, "plain"), phase, layer, [ready])]
        for i in range(K):
            if i + 1 < K:
                sent.append(b.play(self.played(i + 1, 0, "plain"), phase, layer, [ready]))
            if K == 1:
                done = b.play(self.played(i, 1, "graph"), phase, layer, [sent[i], *there])
                self._adopt_graph(i)
            else:
                self._keep_arrived(i)
                done = b.play(self.played(i, 1, "plain"), phase, layer, [sent[i], *there])
            last = b.play(self.played(i, 2, "plain"), phase, layer, [done])
        return last

    def backward_kept(self, layer: int, deps: list[int]) -> int:
        """From the output's gradient to the input's, after `forward_kept`; products of a checkpoint again."""
        b, K, row = self.builder, self.context.chunks, self.context.model.hidden_size * self.context.b
        self._open_moved(layer)
        last = b.play(self._there_again(0), "backward", layer, deps)
        for i in range(K):
            routes = sum(self.context.routes(i)) * row
            ready = [last]
            if i + 1 < K:
                last = b.play(self._there_again(i + 1), "backward", layer, deps)
            if K > 1:
                work = (Work("memory_bound", bytes=2.0 * routes, launches=2),)
                redo = b.add("sort", "compute", _E, "recompute", work, layer=layer, deps=ready,
                             memory=[("dispatch", routes)])  # fmt: skip
                redo = b.play(self.played(i, 1, "graph"), "recompute", layer, [redo])
                ready = [b.add("output freed", "compute", _E, "recompute", layer=layer, deps=[redo],
                               memory=[("dispatch", -routes)])]  # fmt: skip
            else:
                del b.alive[f"kept.{i}"]
            back = b.play(self.played(i, 1, "backward"), "backward", layer, ready)
            if K > 1:
                b.drop(f"arrived.{i}")
            last = b.play(self.played(i, 2, "plain"), "backward", layer, [back])
        return self._return_moved(layer, last)

    def _there_again(self, i: int) -> list[Played]:
        """Gradients of the results go where the rows went."""
        return self.played(i, 0, "plain")

    def _adopt_graph(self, i: int) -> None:
        tape = self.tapes(i)[1]
        size = tape.saved() + sum(value.bytes for value in tape.inputs if value.name == "rows")
        self.builder.adopt(f"kept.{i}", size)

    def _keep_arrived(self, i: int) -> None:
        """The checkpoint's input: rows as they arrived, beside their copy in the experts' order."""
        row = self.context.model.hidden_size * self.context.b
        self.builder.make(f"arrived.{i}", sum(self.context.routes(i)) * row, "dispatch")

    def backward(self, layer: int, deps: list[int]) -> int:
        """Chunk by chunk: inputs and output gradients dispatched, products recomputed, their backward,
        gradients returned."""
        if self.context.strategy.experts.checkpoint == "nested":
            return self.backward_kept(layer, [self.forward_kept(layer, "recompute", deps)])
        K = self.context.chunks
        ready = [self.counts(layer, "backward", deps)]
        there = self._gather_moved(layer, "backward", ready[0])
        self._open_moved(layer)
        last, sent = ready[0], [self._dispatch_both(0, layer, ready)]
        for i in range(K):
            if i + 1 < K:
                sent.append(self._dispatch_both(i + 1, layer, ready))
            redo = self.builder.play(self.played(i, 1, "graph"), "recompute", layer, [sent[i], *there])
            values = self.tapes(i)[1].values
            back = self.builder.play(self.played(i, 1, "backward"), "backward", layer, [redo])
            last = self._return(i, layer, back, values["out"].bytes)
        return self._return_moved(layer, last)

    def _open_moved(self, layer: int) -> None:
        """The gradient of the packed weights, which all chunks add to."""
        if self.moving:
            self.builder.make("packed gradient", self.moving.values["packed"].bytes, "gathered")

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
