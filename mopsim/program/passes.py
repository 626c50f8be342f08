"""Passes: the templates of a network's layers, embedding and loss, made once for all stages and
microbatches."""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial

from msgspec.structs import replace

from mopsim.common.units import DTYPE_BYTES
from mopsim.graph.experts import EXCHANGES, with_routes_read
from mopsim.graph.layer import decoder_layer, mtp_projection
from mopsim.graph.liveness import Recomputation, backward, everything, forward, held_for_weights
from mopsim.graph.rewrites.eager import in_blocks
from mopsim.graph.rewrites.migration import migrating
from mopsim.graph.rewrites.projections import norms_after
from mopsim.graph.rewrites.quantized import quantized, weights_narrow
from mopsim.graph.rewrites.recompute import (
    AROUND,
    gathered_once,
    plan,
    saved_to_router,
    shares,
    without_weight_grads,
)
from mopsim.graph.rewrites.roomy import shared_stay
from mopsim.graph.rewrites.slices import in_slices
from mopsim.graph.rewrites.stream import widened
from mopsim.graph.tape import Played, Step, Tape
from mopsim.program.builder import Builder, Recorder, stream_of
from mopsim.program.context import Context
from mopsim.program.host_time import maps_routes
from mopsim.program.looped_shards import LoopedShards
from mopsim.program.loss import Half, logit_elements, loss_template
from mopsim.program.offload import OffloadedInputs
from mopsim.program.over_layers import fewer, fullest, held
from mopsim.program.shards import Shards
from mopsim.program.split_backward import SplitShards, weight_grads
from mopsim.program.stage import Stage
from mopsim.program.taped import holding, template
from mopsim.program.template import FRAMES, START, Template
from mopsim.program.update import Update
from mopsim.program.variants import Usual, context_of, usual
from mopsim.program.workload import Work
from mopsim.program.works import implemented, narrow_weight, roomy
from mopsim.spec.model import LayerKind, every_kind
from mopsim.spec.pipeline_order import Slot


class Passes:
    """Layers that are alike share templates. split: weight gradients are apart, of some microbatches at
    least."""

    def __init__(self, context: Context) -> None:
        self.context, strategy = context, context.strategy
        attention, kernels = strategy.attention, context.stack.kernels
        apart = bool(strategy.activations.save_ops) or kernels.gate_up == "separate"
        self.shapes = replace(
            context.shapes,
            exchange=attention.cp_comm_type,
            flash=context.stack.flash,
            softmax=kernels.softmax,
            skips=context.stack.skips_hidden(context.training.plain_attention(context.model)),
            in_order=kernels.sequence_slices == "in_order",
            by_token=kernels.scan_rows == "by_token",
            fused=not apart or strategy.dense.tensor_parallel > 1,
            separate=kernels.gate_up == "separate",
            whole_experts="routed" in kernels.exchanged_rows,
        )
        self.split = strategy.pipeline.splits or strategy.pipeline.folded
        self._tapes: dict[LayerKind, Tape] = {}
        self._templates: dict[tuple[object, ...], Template] = {}
        self._others: dict[Usual, Passes] = {}

    def sharding(self, issue: Builder, stage: Stage) -> Shards:
        """What gathers parameters and reduces gradients."""
        looped = self.context.stack.sharding.loop in ("apart", "together")
        kind = LoopedShards if looped else SplitShards if self.split else Shards
        return kind(self.context, issue, stage)

    def inputs(self, issue: Builder, stage: Stage, slots: Sequence[Slot]) -> OffloadedInputs:
        """What takes inputs of layers to the host."""
        return OffloadedInputs(self.context, issue, stage, slots, self.kept)

    def updates(self, issue: Builder, stage: Stage) -> dict[str, int]:
        """The last step's update beside the first forward: by unit, the op that its gather waits for."""
        return {}

    def update(self, issue: Builder, stage: Stage, reductions: Sequence[int]) -> None:
        """The end of the step."""
        Update(self.context, issue, stage).run(reductions)

    def resident(self, stage: Stage) -> tuple[Step, ...]:
        """What lives through the step, or has been left by the one before."""
        layers = (*(layer for chunk in stage.every for layer in chunk), *stage.extra)
        left = (step for layer in layers for step in self._of(layer)._left(self.tape(layer)))
        logits = (("logits", self.held_logits),) if self.held_logits else ()
        cached = (("params", self._of(layer)._narrow_weights(layer)) for layer in layers)
        found = (*stage.resident(), *(left if self._router_held else ()), *logits, *cached)
        return tuple(step for step in found if step[1])

    def _narrow_weights(self, layer: int) -> int:
        """Bytes of the casts of a layer's weights that stay for good, which chunks share; less the parameters
        that they are."""
        c, exact = self.context, self.context.stack.kernels.exact
        how = c.stack.weights_as(c.strategy.dense.zero)
        if how not in ("cached", "rows", "only") or not c.strategy.precision.is_cast:
            return 0
        each = narrow_weight(c) - c.param * (how == "only")
        return sum({one.name: weights_narrow(one, each, exact) for one in self.tape(layer).kernels}.values())

    @cached_property
    def held_logits(self) -> int:
        """Bytes of logits that the training loop holds until the next microbatch's are made."""
        c, run = self.context, self.context.stack.kernels
        if run.logits_until == "backward" or not c.logits_held or c.strategy.pipeline.pipeline_parallel > 1:
            return 0
        return logit_elements(c) * (c.wide if c.logits_held == "copy" else c.b)

    def key(self, layer: int) -> tuple[LayerKind, Usual]:
        """Equal for layers that run alike."""
        return self._kinds[layer], usual(self.context, layer)

    def _of(self, layer: int) -> "Passes":
        """Those of layers that run as a layer does."""
        if all(how := usual(self.context, layer)):
            return self
        if how not in self._others:
            self._others[how] = type(self)(context_of(self.context, *how))
        return self._others[how]

    @cached_property
    def _kinds(self) -> tuple[LayerKind, ...]:
        return every_kind(self.context.model)

    def tape(self, layer: int) -> Tape:
        """A layer's tape; weight gradients are added into resident buffers."""
        if (other := self._of(layer)) is not self:
            return other.tape(layer)
        key = self._kinds[layer]
        if key not in self._tapes:
            c, etp = self.context, self.context.strategy.experts.expert_tensor_parallel
            routes = tuple(count * etp for count in c.routes()) if key.routed else ()
            tape, share = self._tape(layer, routes), self._rows_kept
            if routes and share < 1.0 and not c.rows_room:
                tape = held(tape, self._tape(layer, fewer(routes, share)), self._plan(tape))
            self._tapes[key] = tape
        return self._tapes[key]

    @cached_property
    def _rows_kept(self) -> float:
        """Of the rows of a layer's busiest rank, those that a rank keeps in each of its layers: all, unless
        loads were measured and no expert has every token, as the worst routing has it."""
        c, how, loads = self.context, self.context.strategy, self.context.training.routing
        padded = c.stack.kernels.expert_padding in ("busiest", "fresh")
        apart = c.stack.runtime or c.rooms or padded or how.experts.balance != "none"
        if isinstance(loads, str) or apart or max(loads) * c.model.num_experts_per_tok > 1.0 - 1e-6:
            return 1.0
        layers = max(1, c.model.num_moe_layers // how.pipeline.pipeline_parallel)
        return fullest(tuple(loads), how.experts.expert_parallel, layers)

    def _tape(self, layer: int, routes: tuple[int, ...]) -> Tape:
        c, experts = self.context, self.context.strategy.experts
        split, once, beside = c.groups["experts"].size > 1, experts.sends_once, c.beside_rows
        tape = decoder_layer(c.model, self.shapes, layer, routes, split, once, beside, experts.gathers)
        if routes and split and c.migration:
            tape = replace(tape, kernels=migrating(tape.kernels, c.migration))
        if routes and split and maps_routes(c.strategy, c.stack):
            tape = replace(tape, kernels=with_routes_read(tape.kernels))
        precision = c.strategy.precision
        if precision.is_cast and c.stack.kernels.casts == "kept":
            share, how = DTYPE_BYTES[precision.matmul] / c.b, c.stack.kernels
            tape = quantized(tape, share, c.strategy.activations.modules, how.norm_within, how.exact)
        tape = self._added_up(tape)
        if not c.stack.recompute.gathers_again:
            tape = gathered_once(tape, c.strategy.activations.recompute, c.strategy.activations.modules)
        kernels = implemented(tape.kernels, c)
        made = {value.name for kernel in kernels for value in kernel.writes}
        run = {"", *(kernel.name for kernel in kernels)}
        frames = tuple(one for one in FRAMES if c.stack.host.frames and one[0] in made and one[1] in run)
        kernels = norms_after(kernels) if c.stack.kernels.qk_norms == "in_turn" else kernels
        kernels = shared_stay(kernels) if c.weaves or "router" in c.stack.host.graphs else kernels
        kernels = roomy(kernels, c) if routes and c.rows_room else kernels
        tape, ways = replace(tape, kernels=kernels, held=frames), c.stack.kernels
        tape = widened(tape, c.stream // c.b, ways.autocast and not ways.compiled) if c.stream > c.b else tape
        if (way := ways.ring_blocks) != "fused":
            ranks = c.strategy.attention.context_parallel
            tape = replace(tape, kernels=in_blocks(tape.kernels, ranks, c.b, c.wide, way))
        if 0 < c.strategy.dense.chunk_tokens < c.tokens:
            tape = replace(tape, kernels=in_slices(tape.kernels, c.tokens, c.strategy.dense.chunk_tokens))
        return tape

    @property
    def _in_buffers(self) -> bool:
        """Whether products add the gradients of their weights to resident buffers."""
        return not self.context.shards_params and self.context.stack.kernels.weight_grads == "fused"

    def _added_up(self, tape: Tape) -> Tape:
        """The tape, without gradients of weights where none are made."""
        return replace(tape, kernels=without_weight_grads(tape.kernels)) if self._in_buffers else tape

    def placeholders(self, layers: Iterable[int]) -> int:
        """Bytes of the empty weight gradients that Transformer Engine hands to autograd where the true ones
        are added into resident buffers: one of each shape (`get_dummy_wgrad`)."""
        if not self._in_buffers:
            return 0
        kernels = (kernel for layer in layers for kernel in self.tape(layer).kernels)
        shapes = {(one.n, one.k) for it in kernels if it.component != "router" for one in it.matmuls}
        return int(sum(n * k for n, k in shapes) * self.context.param)

    def forward(self, layer: int) -> Template:
        """x -> z, which is new; x stays where the backward wants it."""
        return self._of(layer)._layer("forward", layer)

    def backward(self, layer: int) -> Template:
        """z's gradient -> x's; x is freed where it stayed. Weight gradients included."""
        return self._of(layer)._layer("backward", layer)

    def first_half(self, layer: int) -> Template:
        """As `backward`, without weight gradients of products."""
        return self._of(layer)._layer("first half", layer)

    def weights(self, layer: int) -> Template:
        """Weight gradients that a first half left."""
        return self._of(layer)._layer("weights", layer)

    def _layer(self, part: str, layer: int) -> Template:
        make = {"forward": self._forward, "backward": self._backward, "weights": self._weights}
        halved = partial(self._reverse, halves=True)
        return self._made((part, self._kinds[layer]), partial(make.get(part, halved), layer))

    def kept(self, layer: int) -> tuple[Step, ...]:
        """What a layer's forward leaves for its backward beside its input and its output, by category."""
        net = self._net(forward(tape := self.tape(layer), self._of(layer)._plan(tape)))
        return tuple((category, size) for category, size in net.items() if size)

    def handed(self, layer: int) -> int:
        """Bytes of what parts of a woven layer hand each other and keep (HostCosts.woven_grads): inputs of
        attention and of what follows, their gradients, and those of rows before and after exchanges."""
        if not self.context.weaves or self.context.stack.host.woven_grads == "layer":
            return 0
        tape = self.tape(layer)
        sent = {one.name: one for one in tape.kernels if one.name in EXCHANGES}
        rows = [name for one in sent.values() for name in one.reads[:1]]
        rows += [value.name for value in sent[EXCHANGES[0]].writes] if sent else []
        return 4 * self.context.hidden + sum(tape.values[name].bytes for name in rows)

    @cached_property
    def _projection(self) -> tuple[Tape, Recomputation]:
        """What is before an MTP layer, and what it leaves: with full recomputation its inputs."""
        tape = mtp_projection(self.context.model, self.shapes)
        tape = self._added_up(replace(tape, kernels=implemented(tape.kernels, self.context)))
        if self.context.strategy.activations.recompute != "full" or self.context.not_recomputed:
            return tape, everything(tape)
        inner = range(1, len(tape.kernels) - 1)
        made = {value.name for index in inner for value in tape.kernels[index].writes}
        return tape, Recomputation(frozenset(tape.kept & made), (frozenset(inner),), frozenset({"e"}))

    @property
    def keeps_normed(self) -> bool:
        """Whether the backward of the projection before an MTP layer starts from the hidden state itself."""
        tape, chosen = self._projection
        return bool(chosen.again) or any("x" in kernel.saves for kernel in tape.kernels)

    def projection(self, direction: str) -> Template:
        """The projection before an MTP layer."""
        way, c = forward if direction == "forward" else backward, self.context
        return self._made(("projection", direction), lambda: template(way(*self._projection), c, direction))

    def loss(self, direction: str, half: Half = "") -> Template:
        """Final norm, projection and cross entropy: the last hidden state is freed, its gradient made."""
        make = partial(loss_template, self.context, direction, self._input, half)
        return self._made(("loss", direction, half), make)

    def embedding(self, direction: str) -> Template:
        """Rows of the embedding; backward, the gradient of the first layer's input is freed. Where
        products add theirs to its sum, torch makes that of the embedding whole and adds it: at 76,032 x
        4,096 in bf16 on H100 some 1.9 ms (BastiaanGroot/ML-Infrastructure-Engineer,
        training/profiles/q8b-baseline), 1.3 by its traffic."""
        c, draft = self.context, Recorder(self.context.groups)
        if direction == "backward":
            unit = c.edges["embedding"]
            moved = 2.0 * unit.padded * (c.b + c.grad) if self._in_buffers else 0.0  # zeros, rows, their sum
            work = Work("memory_bound", bytes=3.0 * c.hidden + moved)
            again = not c.shards_params and c.training.num_microbatches(c.strategy) > 1
            whole = unit.largest * c.b if self._in_buffers or again or c.one_weight else 0
            made = (("activations", whole), ("activations", -whole)) if whole else ()
            memory = (*made, *self._input)  # torch makes the whole gradient before it is added to its sum
            draft.add("embedding", "compute", "embedding", "backward", (work,), (START,), memory)
            return draft.template()
        size, group = float(c.shapes.region_tokens * c.model.hidden_size * c.b), c.groups["tensor"]
        work, memory = Work("memory_bound", bytes=2.0 * size), (("activations", c.hidden),)
        ready = draft.add("embedding", "compute", "embedding", "forward", (work,), (START,), memory)
        if group.size > 1 and c.stack.sharding.embedding == "split":
            kind = "reduce_scatter" if c.shapes.sequence_parallel else "all_reduce"
            summed = Work(kind, bytes=size, group=group)  # partial rows of a split vocabulary
            draft.add("embedding", stream_of(group, "tensor"), "embedding", "forward", (summed,), (ready,))
        return draft.template()

    @property
    def left(self) -> tuple[Step, ...]:
        """What is freed once the embedding's gradient is reduced."""
        return ()

    @property
    def _input(self) -> tuple[tuple[str, int], ...]:
        return (("activations", -self.context.hidden),)

    def _made(self, key: tuple[object, ...], make: Callable[[], Template]) -> Template:
        if key not in self._templates:
            self._templates[key] = make()
        return self._templates[key]

    def _forward(self, layer: int) -> Template:
        tape = self.tape(layer)
        left = tuple((category, -size) for category, size in self._left(tape)) if self._turns else ()
        last = left if self._wants_input(tape) else (*self._input, *left)
        return template(forward(tape, self._plan(tape)), self.context, "forward", last)

    @property
    def _router_held(self) -> bool:
        """Whether what a recomputation saves on the way to its router outlives it."""
        return self.context.stack.recompute.router_graph == "held"

    @property
    def _turns(self) -> bool:
        """Whether that is freed in every forward and made in every backward; in pipelines, some of whose
        forwards come one after the other, it is counted as if it were always there."""
        pipeline = self.context.strategy.pipeline
        return self._router_held and pipeline.pipeline_parallel == 1 and not pipeline.folded

    def _left(self, tape: Tape) -> tuple[Step, ...]:
        """What a layer's recomputation leaves until its next forward (see Recompute.router_graph)."""
        left = (tape.values[name] for name in sorted(saved_to_router(tape, self._plan(tape))))
        return tuple((value.category, value.bytes) for value in left)

    def keeps_input(self, layer: int) -> bool:
        """Whether a layer's input is there until its backward, on the device or on the host: then its
        templates are the same wherever that is."""
        return self._of(layer)._wants_input(self.tape(layer))

    def _wants_input(self, tape: Tape) -> bool:
        """Whether anything reads a layer's input in its backward: not where all that a layer keeps is made
        of it, as a norm that torch composes keeps its copy in fp32. What goes to the host is kept whole."""
        activations = self.context.strategy.activations
        away = activations.layer_inputs == "host" or activations.cpu_offload_layers > 0
        saved = any("x" in kernel.saves for kernel in tape.kernels)
        again = any("x" in tape.kernels[i].reads for region in self._plan(tape).again for i in region)
        return away or saved or again or self.split

    def _backward(self, layer: int) -> Template:
        return self._reverse(layer)

    def _reverse(self, layer: int, halves: bool = False) -> Template:
        chosen = self._plan(tape := self.tape(layer))
        held = held_for_weights(tape, chosen) if halves else frozenset()
        freed = self._input if self._wants_input(tape) else ()
        held |= saved_to_router(tape, chosen) if self._turns else frozenset()
        played = backward(tape, chosen, held, split=halves)
        if self.context.stack.recompute.holds_output and chosen.again:
            played = holding(played, ("activations", self.context.hidden))
        return template(played, self.context, "backward", freed, halves)

    def _weights(self, layer: int) -> Template:
        chosen = self._plan(tape := self.tape(layer))
        held = held_for_weights(tape, chosen)
        net = self._net((*forward(tape, chosen), *backward(tape, chosen, held, split=True)))
        return weight_grads(tape, self.context, net, held)

    def _net(self, played: Iterable[Played]) -> dict[str, int]:
        """Bytes that are left by category, without the layer's output, which the next layer frees."""
        net = {"activations": -self.context.hidden}
        for category, size in (step for item in played for step in item.memory):
            net[category] = net.get(category, 0) + size
        return net

    def again(self) -> dict[str, tuple[float, float, tuple[str, ...]]]:
        """What of each component is recomputed where it is not whole (`shares`)."""
        found: dict[str, tuple[float, float, tuple[str, ...]]] = {}
        modules = self.context.strategy.activations.modules
        for layer in {self.key(layer): layer for layer in range(len(self._kinds))}.values():
            tape, of = self.tape(layer), self._of(layer)
            if (chosen := of._plan(tape)).again and of._how(tape)[0] != "full":
                found |= shares(tape, chosen, modules)
        return found

    def _how(self, tape: Tape) -> tuple[str, tuple[str, ...]]:
        """`Activations.recompute` for a tape, and the kernels that a full one leaves out."""
        activations, own = self.context.strategy.activations, self.context.stack.recompute
        how, kept = activations.recompute, activations.save_ops
        routed = own.kept_routed and any(kernel.component == "experts" for kernel in tape.kernels)
        own_choice = {"full": kept == own.kept, "selective": activations.modules == own.selective}
        how, kept = ("full", own.kept_routed) if routed and own_choice.get(how) else (how, kept)
        return how, own.listed(kept, self.context.strategy.precision.matmul)

    def _plan(self, tape: Tape) -> Recomputation:
        activations, own = self.context.strategy.activations, self.context.stack.recompute
        (how, kept), scattered = self._how(tape), own.sums == "scattered"
        within, apart = self.context.stack.kernels.norm_within, () if own.around else AROUND
        whole = "attention_core" if self.context.stack.attention in own.kept_inputs else ""
        return plan(tape, how, activations.modules, kept, own.stops_early, apart, within, scattered, whole)
