"""Routed experts whose inputs are kept from a forward to its backward: of one chunk with all that products
keep, of several what arrived for each, beside which the products are a checkpoint.

A pipeline of chunks, dispatch(i+1) | experts(i) | combine(i-1).
A chunk is cut where it waits for the wire: send | sort, products | give back | sum. Its buffers that outlive
an op are named `….i`: what arrived, what a graph keeps, what a caller in Python holds until it returns.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from mopsim.graph.experts import combine, dispatch, experts
from mopsim.graph.rewrites.migration import on_packed
from mopsim.graph.tape import Played, Tape
from mopsim.program.builder import Builder
from mopsim.program.context import Context
from mopsim.program.pairs.moved_experts import MovedExperts
from mopsim.program.taped import play

_E = "experts"


@dataclass(frozen=True)
class Chunk:
    """The tapes of one chunk: h -> arrived -> rows -> out -> returned -> f."""

    send: Tape
    sort: Tape
    products: Tape
    give_back: Tape
    sum: Tape


class KeptExperts:
    """As autograd runs them: a caller in Python holds the experts' output until it is home, and under
    least-loaded placement what arrived as well (both as in the code of arXiv 2601.17111)."""

    def __init__(self, context: Context, builder: Builder) -> None:
        self.context, self.builder = context, builder
        self.split = context.groups["experts"].size > 1
        self.moved = MovedExperts(context, builder)
        self._chunks: dict[tuple[int, tuple[int, ...]], Chunk] = {}
        self._played: dict[tuple[int, str], tuple[Tape, list[Played]]] = {}

    def chunk(self, index: int) -> Chunk:
        """The tapes of chunk `index`; chunks of equal size share them."""
        context = self.context
        tokens, routes = context.chunk_tokens(index), context.routes(index)
        key = (tokens, routes)
        if key not in self._chunks:
            total, tensor = sum(routes), context.strategy.experts.expert_tensor_parallel
            there = dispatch(context.model, tokens, total, context.b, context.wide, self.split)
            back = combine(context.model, tokens, total, context.b, self.split)
            products = experts(context.model, routes, context.b, context.wide, tensor)
            if self.moved:
                packed = replace(self.moved.tape.values["packed"], grad=False)  # one gradient for all chunks
                inputs = (*products.inputs, packed)
                products = replace(products, inputs=inputs, kernels=on_packed(products.kernels))
            arrived, returned = there.values["arrived"], back.values["returned"]
            self._chunks[key] = Chunk(
                Tape(there.inputs, there.kernels[:-1], ("arrived",)),
                Tape((arrived,), there.kernels[-1:], ("rows",), consumes=("arrived",)),
                products,
                Tape(back.inputs, back.kernels[:-1], ("returned",), consumes=("out",)),
                Tape((returned,), back.kernels[-1:], ("f",), consumes=("returned",)),
            )
        return self._chunks[key]

    def play(self, tape: Tape, mode: str, phase: str, layer: int, deps: Iterable[int | None]) -> int:
        """A tape `plain`, as `graph`, `backward`, or `held`: its inputs live on."""
        key = (id(tape), mode)
        if key not in self._played:
            run = replace(tape, consumes=()) if mode == "held" else tape
            self._played[key] = (tape, run.backward() if mode == "backward" else run.forward(mode == "graph"))
        return play(self.builder, self.context, self._played[key][1], phase, layer, deps)

    def counts(self, layer: int, phase: str, deps: list[int]) -> int:
        """The exchange of route counts, once per layer; the host waits for it."""
        experts = self.context.model.num_local_experts
        size, group = 8.0 * experts * self.context.chunks, self.context.groups["experts"]
        there = self.builder.collective(
            "counts", "all_to_all", size, group, "router", phase, layer=layer, deps=deps
        )
        return self.builder.add(
            "counts", "compute", "router", phase, layer=layer, deps=[there], awaited=self.split
        )

    def forward(self, layer: int, phase: str, deps: list[int], waits: Iterable[int | None] = ()) -> int:
        """All chunks forward; adds into the layer's output. waits: what the products wait for beside their
        rows. Returns the last op."""
        b, K = self.builder, self.context.chunks
        ready = self.counts(layer, phase, deps)
        there = [*waits, *self.moved.gather(layer, phase, ready)]
        sent = [self.play(self.chunk(0).send, "plain", phase, layer, [ready])]
        back: list[int] = []
        last = ready
        for i in range(K):
            if i + 1 < K:
                rows = [self.moved.read(layer, phase, ready)]
                sent.append(self.play(self.chunk(i + 1).send, "plain", phase, layer, rows))
            chunk, graph = self.chunk(i), K == 1
            hold = K > 1 or bool(self.moved)
            done = self.play(chunk.sort, "held" if hold else "plain", phase, layer, [sent[i]])
            if hold:
                b.adopt(f"arrived.{i}", chunk.sort.inputs[0].bytes, "dispatch")
            done = self.play(chunk.products, "graph" if graph else "plain", phase, layer, [done, *there])
            if graph:
                b.adopt(f"kept.{i}", chunk.products.saved())
            if i:
                last = self._sum(i - 1, phase, layer, back[i - 1])
            back.append(self.play(chunk.give_back, "held", phase, layer, [done]))
            b.adopt(f"out.{i}", chunk.give_back.inputs[0].bytes, "dispatch")
        last = self._sum(K - 1, phase, layer, back[-1])
        if K == 1 and self.moved:
            b.drop("arrived.0")
        return last

    def _sum(self, i: int, phase: str, layer: int, after: int) -> int:
        last = self.play(self.chunk(i).sum, "plain", phase, layer, [after])
        if f"out.{i}" in self.builder.alive:
            self.builder.drop(f"out.{i}")
        return last

    def backward(self, layer: int, deps: list[int]) -> int:
        """From the output's gradient to the input's, after `forward`; products of a checkpoint again."""
        b, K = self.builder, self.context.chunks
        self.moved.open()
        last, sent = -1, [self.play(self.chunk(0).send, "plain", "backward", layer, deps)]
        for i in range(K):
            chunk = self.chunk(i)
            if i + 1 < K:
                sent.append(self.play(self.chunk(i + 1).send, "plain", "backward", layer, deps))
            done = self.play(chunk.sort, "plain", "backward", layer, [sent[i]])
            if K > 1:
                done = self._again(i, layer, done)
                b.drop(f"arrived.{i}")
            else:
                del b.alive["kept.0"]  # the backward frees it
            done = self.play(chunk.products, "backward", "backward", layer, [done])
            done = self.play(chunk.give_back, "plain", "backward", layer, [done])
            last = self.play(chunk.sum, "plain", "backward", layer, [done])
        return self.moved.send_home(layer, last)

    def _again(self, i: int, layer: int, after: int) -> int:
        """The products of a checkpoint from what arrived, with a graph; their output is not needed."""
        chunk = self.chunk(i)
        done = self.play(chunk.sort, "held", "recompute", layer, [after])
        done = self.play(chunk.products, "graph", "recompute", layer, [done])
        return self._free_output(i, layer, "recompute", done)

    def _free_output(self, i: int, layer: int, phase: str, after: int) -> int:
        out = self.chunk(i).products.values["out"].bytes
        freed = [("dispatch", -out)]
        return self.builder.add("output freed", "compute", _E, phase, layer=layer, deps=[after], memory=freed)
