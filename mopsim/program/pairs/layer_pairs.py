"""Layers and loss as pairs of a forward and a backward without an autograd graph, as mopexec.flat runs them,
each recorded as a template. Memory moves on the compute stream, in the order in which the host issues it."""

from collections.abc import Iterable, Sequence

from mopsim.graph.tape import Step
from mopsim.program.builder import Builder, Recorder
from mopsim.program.loss import Half
from mopsim.program.offload import OffloadedInputs
from mopsim.program.pairs.attention_pair import AttentionPair
from mopsim.program.pairs.early_update import EarlyUpdate
from mopsim.program.pairs.experts_pair import ExpertsPair
from mopsim.program.pairs.ffn_pair import FfnPair
from mopsim.program.pairs.flat_units import FlatUnits
from mopsim.program.pairs.flat_update import PairUpdate
from mopsim.program.pairs.from_tapes import TapedAttention, TapedExperts
from mopsim.program.pairs.joined_pair import JoinedPair
from mopsim.program.pairs.nested_experts import NestedExperts
from mopsim.program.pairs.ring_rows import add_rows, look_up
from mopsim.program.pairs.rows import Rows
from mopsim.program.passes import Passes
from mopsim.program.stage import Stage
from mopsim.program.strip_loss import StripLoss
from mopsim.program.template import EXPERTS, START, Template
from mopsim.spec.pipeline_order import Slot

_V = "vocabulary"


class Pairs(Passes):
    """Every layer is recomputed from its input; its gradient is one buffer that is changed in place."""

    def recorder(self) -> Recorder:
        return Recorder(self.context.groups)

    def sharding(self, issue: Builder, stage: Stage) -> FlatUnits:
        return FlatUnits(self.context, issue, stage)

    def inputs(self, issue: Builder, stage: Stage, slots: Sequence[Slot]) -> OffloadedInputs:
        return OffloadedInputs(self.context, issue, stage, slots, self.kept, explicit=True)

    def updates(self, issue: Builder, stage: Stage) -> dict[str, int]:
        if self.context.strategy.optimizer.overlap == "none":
            return {}
        return self._optimizer(issue, stage).beside()

    def update(self, issue: Builder, stage: Stage, reductions: Sequence[int]) -> None:
        self._optimizer(issue, stage).run(reductions)

    def _optimizer(self, issue: Builder, stage: Stage) -> PairUpdate:
        early = self.context.strategy.optimizer.overlap == "backward"
        return (EarlyUpdate if early else PairUpdate)(self.context, issue, stage)

    def resident(self, stage: Stage) -> tuple[Step, ...]:
        """Beside a stage's: pinned buffers of the bucket on its way to the host; staging buffers of an update
        beside the step."""
        c, found = self.context, list(stage.resident())
        if c.strategy.optimizer.update_on == "host":
            precision = c.strategy.precision
            largest = min(c.strategy.optimizer.bucket_params, sum(unit.shard_numel for unit in stage.units))
            found.append(
                ("host/staging", 2 * largest * ((8 if precision.masters == "float64" else 4) + c.param))
            )
        if c.strategy.optimizer.overlap != "none":
            found.append(("staging", self._optimizer(self.recorder(), stage).staging))
        return tuple(found)

    def placeholders(self, layers: Iterable[int]) -> int:
        return 0

    @property
    def left(self) -> tuple[Step, ...]:
        return self._input

    def loss(self, direction: str, half: Half = "") -> Template:
        """Losses in strips are forward and backward at once, the final norm with them."""
        make = self._loss_forward if direction == "forward" else self._loss_backward
        if half == ("norm" if direction == "forward" else "terms"):
            return self.recorder().template()
        return self._made(("loss", direction), make)

    def embedding(self, direction: str) -> Template:
        make = self._looked if direction == "forward" else self._embedding
        return self._made(("embedding", direction), make)

    keeps_normed = False

    def keeps_input(self, layer: int) -> bool:
        return True

    def projection(self, direction: str) -> Template:
        """Before an MTP layer; backward, of its tokens' embeddings: the rest is the layer's."""
        make = self._joined if direction == "forward" else self._looked_up
        return self._made(("projection", direction), make)

    def _joined(self) -> Template:
        c, b = self.context, self.recorder()
        JoinedPair(c, b).forward(START)
        return b.template()

    def _looked_up(self) -> Template:
        b = self.recorder()
        b.adopt("grad", self.context.hidden)
        add_rows(self.context, b, START)
        b.drop("grad")
        return b.template()

    def backward(self, layer: int) -> Template:
        """That of an MTP layer also goes through what is before it."""
        further = layer >= self.context.model.num_hidden_layers
        kind = self._kinds[layer]
        return self._made(("backward", kind, further), lambda: self._backward(layer))

    def _forward(self, layer: int) -> Template:
        c, b = self.context, self.recorder()
        b.adopt("x", c.hidden)
        b.rename("x", "input", "boundaries")
        self._attention(b).forward(layer, START)
        ffn = FfnPair(c, b)
        if self._kinds[layer].routed:
            experts = self._experts(b, ffn)
            experts.plan(layer)
            b.cut("experts")
            experts.forward(layer, EXPERTS)
        else:
            ffn.forward(c.tokens, "dense_ffn", layer)
        return b.template()

    def _backward(self, layer: int) -> Template:
        c, b = self.context, self.recorder()
        attention, ffn = self._attention(b), FfnPair(c, b)
        b.adopt("x", c.hidden, "boundaries")
        b.adopt("grad", c.hidden)
        attention.recompute(layer, START)
        experts = self._experts(b, ffn) if self._kinds[layer].routed else None
        if isinstance(experts, NestedExperts):
            b.cut("experts again")
            experts.recompute(layer, EXPERTS)
        b.cut("recomputed")
        if experts is not None:
            b.adopt(f"choice{layer}", experts.choice)
            if c.stack.recompute.chunk_inputs == "autograd":
                ffn.shared(layer, backward=True)
                TapedExperts(c, b).backward(layer, EXPERTS)
            else:
                experts.backward(layer, EXPERTS)
        else:
            ffn.backward(c.tokens, "dense_ffn", layer)
        b.drop("x1")
        b.cut("experts")
        attention.backward(layer)
        if layer >= c.model.num_hidden_layers:
            JoinedPair(c, b).backward(layer)
        b.drop("x")
        return b.template()

    def _experts(self, b: Recorder, ffn: FfnPair) -> ExpertsPair:
        nested = self.context.stack.recompute.chunk_inputs == "nested"
        return (NestedExperts if nested else ExpertsPair)(self.context, b, ffn)

    def _attention(self, b: Recorder) -> AttentionPair | TapedAttention:
        kind = TapedAttention if self.context.model.composes_projections else AttentionPair
        return kind(self.context, b)

    def _loss_forward(self) -> Template:
        """Of all rows, forward and backward: the gradient of the normed output is made, x stays."""
        c, b = self.context, self.recorder()
        norm = Rows(c, b).norm(c.tokens, c.model.hidden_size, "hidden")
        b.compute("final_norm", _V, "forward", -1, [norm], START)
        b.cut("head")
        loss = StripLoss(c, b)
        if c.strategy.vocabulary.loss == "ring":
            loss.ring()
        else:
            loss.local()
        b.drop("hidden")
        return b.template()

    def _loss_backward(self) -> Template:
        c, b = self.context, self.recorder()
        b.adopt("x", c.hidden)
        norm = Rows(c, b).norm_backward(c.tokens, c.model.hidden_size)
        b.compute("final_norm", _V, "backward", -1, [norm], START)
        b.drop("x")
        return b.template()

    def _looked(self) -> Template:
        b = self.recorder()
        look_up(self.context, b, "x", START)
        return b.template()

    def _embedding(self) -> Template:
        b = self.recorder()
        add_rows(self.context, b, START)
        return b.template()
