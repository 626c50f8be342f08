"""One step of one pipeline stage: slots of the schedule, then reduction, clip, optimizer and gathering."""

from collections import Counter
from collections.abc import Sequence
from functools import cache

from mopsim.program import data_parallel, outputs, scales
from mopsim.program.builder import Builder, state_stream
from mopsim.program.context import Context
from mopsim.program.kept_grads import KeptGrads
from mopsim.program.loss import Half, logit_elements, wanted_again
from mopsim.program.messages import Messages
from mopsim.program.offload import OffloadedInputs
from mopsim.program.passes import Passes
from mopsim.program.reads import LOSS, GradNorms
from mopsim.program.split_backward import second_half
from mopsim.program.stage import Stage
from mopsim.program.template import Ops, merged
from mopsim.program.units import ShardedUnit, looked_up
from mopsim.program.updated import UpdatedParameters
from mopsim.program.workload import Program, Repeat, Work
from mopsim.spec import pipeline_order
from mopsim.spec.pipeline_order import Slot

MAKES = {
    "backward": ("inputs", "weights"),
    "input_grad": ("inputs",),
    "weight_grad": ("weights",),
    "forward": (),
}
"""Gradients that a pass makes."""


class StageStep:
    """Lowers the program of one stage. Microbatch i of part g sends under `forward i g` and `backward i
    g`. left: passes that make a chunk's gradients, still to come."""

    boundaries: OffloadedInputs
    updated: UpdatedParameters

    def __init__(self, context: Context, passes: Passes, index: int, *, compose: bool = True) -> None:
        self.c, self.passes, self.handed = context, passes, cache(passes.handed)
        self.stage = Stage(context, index, passes.key if compose else None)
        self.visits, self.repeats, self.reductions = list[int](), list[Repeat](), list[int]()
        self.stands_for: Counter[str] = Counter()
        self.issue = Builder(context.groups)
        self.shards = passes.sharding(self.issue, self.stage)
        self.kept = KeptGrads(context, self.issue, self.stage)
        self.overlap, self.norms = context.strategy.overlap, GradNorms(context, self.stage.is_first)
        self.after: Ops = ()
        self.left: Counter[tuple[str, int]] = Counter()
        self.messages = Messages(context, self.issue, self.stage)

    def program(self, microbatches: int) -> Program:
        """A step of `microbatches` microbatches."""
        p, pairs = self.c.strategy.pipeline, self.c.weaves
        turns = pipeline_order.turns(
            p.schedule, p.pipeline_parallel, p.virtual_stages, microbatches, self.stage.index, int(pairs)
        )
        slots = [slot for turn in turns for slot in turn]
        self.boundaries = self.passes.inputs(self.issue, self.stage, slots)
        self.updated = UpdatedParameters(self.c, self.issue, self.stage)
        self.shards.updated = self.passes.updates(self.issue, self.stage)
        self.left.update((made, chunk) for phase, _, chunk in slots for made in MAKES[phase])
        for turn in turns:
            if len(turn) > 1:
                self._pair(turn[0], turn[1], pairs)
            else:
                self._slot(turn[0])
        self.issue.microbatch = -1
        self.messages.freed()
        self._reduce_rest()
        returned = outputs.merged(self.c, self.issue, self.stage, microbatches)
        self.passes.update(self.issue, self.stage, self.reductions)
        freed = self.stands_for
        freed.update({"grads": sum((self.shards.made | self.kept.fresh).values())})
        if memory := [(category, -size) for category, size in freed.items() if size]:
            self.issue.add("gradients freed", "compute", "optimizer", "optimizer", (), (), memory)
        self.issue.flush("optimizer", "optimizer")
        layers = (*(layer for chunk in self.stage.chunks for layer in chunk), *self.stage.extra)
        extra = (
            ("framework", self.passes.placeholders(layers)), ("grads", self.kept.resident),
            ("logits", returned),
            (f"host/{'activations' if self.boundaries.whole else 'boundaries'}", self.boundaries.pinned),
        )  # fmt: skip
        resident = (*self.passes.resident(self.stage), *(step for step in extra if step[1]))
        ops, repeats, blocks = tuple(self.issue.ops), tuple(self.repeats), self.stage.flat_bytes
        return Program(ops, self.stage.index, resident, repeats=repeats, blocks=blocks)

    def _slot(self, slot: Slot) -> None:
        phase, microbatch, chunk = slot
        self.issue.microbatch = microbatch
        if phase == "forward":
            self._forward(microbatch, chunk)
        elif phase == "weight_grad":
            self._weights(microbatch, chunk)
        else:
            self._backward(microbatch, chunk, phase == "input_grad")

    def _pair(self, forward: Slot, backward: Slot, woven: bool) -> None:
        """A forward and another microbatch's backward. woven: side by side, each computes while the other
        talks, as DualPipe (arXiv 2412.19437) and Megatron-Core overlap the communication of experts.

        What both need from neighbours and what both leave for them travels together, before and after, unless
        it overlaps (Megatron-Core's `send_forward_backward_recv_forward_backward`): one after the other, two
        stages could each wait for what the other has yet to issue.
        """
        together = not self.overlap.pipeline
        if together:
            self.messages.arrive((forward, backward))
            self.messages.unsent = []
        if woven:
            self.boundaries.woven(backward[1], self.stage.chunks[backward[2]][::-1])
        start, window = len(self.issue.ops), self.boundaries.window
        self._slot(forward)
        middle, sent = len(self.issue.ops), self.after
        if woven:  # neither waits for the other
            self.after, self.boundaries.window = (), window
        self._slot(backward)
        moved = self.issue.weave(start, middle) if woven else {}
        if woven:
            self.after = tuple(moved.get(op, op) for op in (*sent, *self.after))
            self.reductions = [moved.get(op, op) for op in self.reductions]
            self.boundaries.issued(moved)
            self.messages.moved(moved)
            self.updated.issued(moved)
        unsent, self.messages.unsent = self.messages.unsent or [], None
        for way, microbatch, chunk, ready in unsent:
            self._send(way, microbatch, chunk, tuple(moved.get(op, op) for op in ready))

    def _forward(self, microbatch: int, chunk: int) -> None:
        c, issue, part = self.c, self.issue, self.stage.part(chunk)
        ready = self._embed() if part == 0 else self._receive("forward", microbatch, chunk)
        for layer in self.stage.chunks[chunk]:
            self._visit("forward", layer)
            waits = self.shards.before(layer, "forward", self.shards.forward_order(layer, chunk))
            updated = self.updated.before((unit.name for unit in c.layers[layer]), ready)
            self.boundaries.before("forward", microbatch, layer, ready)
            template = self.passes.forward(layer)
            beside = self.shards.beside(template, layer, "forward")
            ready = issue.play(template, layer, (*ready, *waits, *updated), beside)
            self.boundaries.after(microbatch, layer, ready)
            self.shards.after(layer, "forward")
            self._gap("forward", layer)
        ready = scales.agreed(c, issue, "forward", self.stage.every[chunk], ready)
        if part < self.stage.parts - 1:
            self._send("forward", microbatch, chunk, ready)
            return
        issue.hold((("logits", -self.passes.held_logits),))
        if not self.stage.extra:
            self._read(self._loss(ready), "forward")
            return
        ready = self._loss(ready, "norm")
        for layer in self.stage.extra:  # each predicts from the hidden state before it
            ready = self.shards.projected(self.passes.projection("forward"), layer, "forward", ready)
            template, order = self.passes.forward(layer), self.shards.forward_order(layer, chunk)
            waits = self.shards.before(layer, "forward", order)
            waits = (*waits, *self.updated.before((unit.name for unit in c.layers[layer]), ready))
            hooks = self.shards.beside(template, layer, "forward")
            ready = issue.play(template, layer, (*ready, *waits), hooks)
            self.shards.after(layer, "forward")
            ready = self._loss(ready, "norm")
        for _ in self.stage.extra:
            ready = self._loss(ready, "terms")
            issue.hold(wanted_again(c, c.hidden * self.passes.keeps_normed, "forward"))
        self._read(self._loss(ready, "terms"), "forward")

    def _read(self, ready: Ops, phase: str) -> None:
        """The host waits for whether the loss is a number, where it reads that at the end of this phase."""
        if self.c.stack.host.reads_loss(phase):
            self.issue.add("loss read", "compute", "vocabulary", phase, LOSS, ready, awaited=True)

    def _loss(self, ready: Ops, half: Half = "") -> Ops:
        """Final norm, projection on the vocabulary and loss of a hidden state."""
        template, norm = self.passes.loss("forward", half), half == "norm"
        waits = self.shards.normed() if norm else self.shards.edge("head", "forward")
        waits = (*waits, *self.updated.before(("final", "head", "embedding"), ready))
        beside = {} if norm else self.shards.beside(template, -1, "forward")
        return self.issue.play(template, -1, (*ready, *waits), beside)

    def _backward(self, microbatch: int, chunk: int, halves: bool) -> None:
        """halves: gradients of weights are made later."""
        issue, part, sums = self.issue, self.stage.part(chunk), self.shards.sums
        order, splits = list(reversed(self.stage.chunks[chunk])), self.c.strategy.pipeline.splits
        self.left.subtract((made, chunk) for made in MAKES["input_grad" if halves else "backward"])
        whole, final = not self.left["inputs", chunk], not halves and not self.left["weights", chunk]
        self._begin_grads(chunk, halves)
        self.shards.halved(halves)
        sums.last = whole or splits
        if part == self.stage.parts - 1:
            waits = self.shards.edge("head", "backward")
            self.shards.turn((*reversed(self.stage.extra), *order))
            further = (*reversed(self.stage.extra), *order)
            ready = self._loss_backward(microbatch, waits, further, halves, final)
            issue.hold((("logits", self.passes.held_logits),))
            how = self.c.stack.stage_outputs
            if (how == "returned" and self.stage.parts > 1) or (how == "held" and microbatch == 0):
                size = logit_elements(self.c) * self.c.b  # this one's stay, or from now on of the one before
                issue.hold((("logits", size),))
                self.stands_for["logits"] += size
        else:
            ready = self._receive("backward", microbatch, chunk)
        sums.last = final or splits
        for layer in order:
            self._visit("backward", layer)
            ready = self._layer_backward(microbatch, layer, ready, order, halves, final)
            self._gap("backward", layer)
        sums.last = whole or splits
        ready = scales.agreed(self.c, issue, "backward", self.stage.every[chunk], ready)
        if part < self.stage.parts - 1 and not self.messages.stays("forward", chunk):
            issue.hold((("activations", -self.c.held_output),))
        if part > 0:
            ready = ready if halves else self.kept.added(chunk, ready)
            self._send("backward", microbatch, chunk, ready)
            self.after = (*self.after, *self.shards.finish())
            return
        self.shards.begin()
        ready = issue.play(self.passes.embedding("backward"), -1, ready)
        self._reduced(ready, "embedding", final)
        self.after = (*self.after, *self.shards.finish())
        ready = ready if halves else self.kept.added(chunk, ready)
        issue.hold(self.passes.left)
        self._read(ready, "backward")

    def _loss_backward(
        self, microbatch: int, ready: Ops, order: Sequence[int], halves: bool, final: bool
    ) -> Ops:
        """All cross entropies, MTP layers, whose gradient is added to the loss's before, the final norm."""
        c, issue, extra = self.c, self.issue, self.stage.extra
        if not extra:
            ready = issue.play(self.passes.loss("backward"), -1, ready)
            self._reduced(ready, "head", final)
            return ready
        for _ in range(1 + len(extra)):
            ready = issue.play(self.passes.loss("backward", "terms"), -1, ready)
        self._reduced(ready, "head", False)
        kept = c.hidden * self.passes.keeps_normed
        issue.hold(wanted_again(c, kept, "backward") * len(extra))
        for layer in reversed(extra):
            ready = issue.play(self.passes.loss("backward", "norm"), -1, ready)
            ready = self._layer_backward(microbatch, layer, ready, order, halves, final)
            ready = self.shards.projected(self.passes.projection("backward"), layer, "backward", ready)
            if self.shards.adds_in_place:
                continue
            add, memory = (Work("memory_bound", bytes=3.0 * c.hidden),), (("activations", -c.hidden - kept),)
            ready = (issue.add("gradients added", "compute", "vocabulary", "backward", add, ready, memory),)
        return issue.play(self.passes.loss("backward", "norm"), -1, ready)

    def _visit(self, phase: str, layer: int) -> None:
        """A layer begins; what it does may stand for others."""
        self.visits.append(len(self.issue.ops))
        self.issue.times = 1 + sum(gap.times for gap in self.stage.gaps if layer in gap.stands_for(phase))

    def _gap(self, phase: str, layer: int) -> None:
        """The layer is over; layers that are not played may come after it."""
        self.issue.times = 1
        for gap in self.stage.gaps:
            if layer != gap.begins_after(phase):
                continue
            period = len(gap.lead)
            repeat, left = self.issue.repeat(self.visits[-2 * period], self.visits[-period], gap.times)
            self.repeats.append(repeat)
            self.stands_for.update(dict(left))
            if phase == "forward":
                self.boundaries.repeat(gap.lead, gap.times)

    def _layer_backward(
        self, microbatch: int, layer: int, ready: Ops, order: Sequence[int], halves: bool, final: bool
    ) -> Ops:
        waits = self.shards.before(layer, "backward", order)
        waits += self.boundaries.before("backward", microbatch, layer, ready)
        template = self.passes.first_half(layer) if halves else self.passes.backward(layer)
        beside = merged(
            self.shards.beside(template, layer, "backward"), self.boundaries.beside(template, layer)
        )
        ready = self.issue.play(template, layer, (*ready, *waits), beside)
        self.shards.after(layer, "backward", ready)
        self.kept.handed(self.handed(layer))
        self.kept.made(*self.c.layers[layer])
        if final and self._early:
            self._reduce(self.c.layers[layer], ready)
        return ready

    @property
    def _early(self) -> bool:
        """Whether gradients are reduced as soon as the last backward has made them."""
        return bool(self.overlap.grad_reduce) and not self.shards.each and not self.c.keeps_grads

    def _begin_grads(self, chunk: int, later: bool) -> None:
        """A pass that makes weight gradients begins, unless they are made later."""
        if not later and self.c.keeps_grads:
            self.kept.begin(chunk)
            self.stands_for["grads"] -= self.kept.hidden[chunk]

    def _weights(self, microbatch: int, chunk: int) -> None:
        self.left["weights", chunk] -= 1
        final = not self.left["weights", chunk]
        self.shards.sums.last = final or self.c.strategy.pipeline.splits
        self._begin_grads(chunk, later=False)
        ready: Ops = ()
        for layer in reversed((*self.stage.chunks[chunk], *self.stage.extra)):
            self.boundaries.before("weight_grad", microbatch, layer, ready)
            ready = second_half(self.shards, self.issue, self.passes.weights(layer), layer)
            self.kept.made(*self.c.layers[layer])
            if final and self._early:
                self._reduce(self.c.layers[layer], ready)
        self.after = (*self.after, *self.shards.finish())
        self.kept.added(chunk, ready)

    def _embed(self) -> Ops:
        self.messages.freed()
        updated = self.updated.before((unit.name for unit in looked_up(self.c.edges)), self.after)
        waits = (*self.shards.edge("embedding", "forward"), *updated)
        self.shards.start(self.stage.chunks[0])
        ready = self.issue.play(self.passes.embedding("forward"), -1, (*self.after, *waits))
        self.after = ()
        self.shards.done("embedding", "forward")
        return ready

    def _receive(self, way: str, microbatch: int, chunk: int) -> Ops:
        ready, self.after = (*self.messages.receive(way, microbatch, chunk), *self.after), ()
        return ready

    def _send(self, way: str, microbatch: int, chunk: int, ready: Ops) -> None:
        self.after = (*self.after, *self.messages.send(way, microbatch, chunk, ready))

    def _reduced(self, ready: Ops, edge: str, final: bool) -> None:
        """The gradients of an edge are whole: reduced now where that overlaps."""
        self.shards.done(edge, "backward", ready)
        self.kept.made(self.c.edges.get(edge, self.c.edges["embedding"]))
        if final and self._early and edge in self.c.edges:
            self._reduce([self.c.edges[edge]], ready)

    def _reduce(self, units: Sequence[ShardedUnit], ready: Ops) -> None:
        self.shards.reduced.update(unit.name for unit in units)
        messages, norms = data_parallel.reduction(self.c, units), self.norms.work(units)
        if work := (*(data_parallel.grad_passes(self.c, units) if messages else ()), *norms):
            part = messages[0][0] if messages else units[0].component
            read = any(one.launches > 1 for one in norms)
            op = self.issue.add("whole gradients", "compute", part, "backward", work, ready, awaited=read)
            ready = (op,)
        if work := data_parallel.scaled(self.c, units):
            part = units[0].component
            ready = (self.issue.add("scaled gradients", "compute", part, "backward", work, ready),)
        for part, sent in messages:
            op = self.issue.add("reduce gradients", state_stream(sent), part, "backward", (sent,), ready)
            self.reductions.append(op)

    def _reduce_rest(self) -> None:
        """Units whose gradients are not reduced yet, after all passes."""
        if self.shards.each:
            self.reductions += self.shards.ops
            return
        rest = [unit for unit in self.stage.units if unit.name not in self.shards.reduced]
        self._reduce(rest, self.issue.tail())
        if self.stage.shares_embedding and (self.stage.is_first or self.stage.is_last):
            self.reductions.append(data_parallel.shared_embedding(self.c, self.issue, self.reductions))
