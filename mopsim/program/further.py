"""What a stage's shards do around MTP layers, which predict further tokens and live beside the loss."""

from collections.abc import Callable, Sequence

from mopsim.program.builder import Builder
from mopsim.program.context import Context
from mopsim.program.stage import Stage
from mopsim.program.template import Hooks, Ops, Template
from mopsim.program.units import ShardedUnit


class FurtherLayers:
    """Their parameters are gathered when they run. adds_in_place: whether the two gradients of a hidden state
    that such a layer reads are one buffer."""

    adds_in_place = False
    c: Context
    copied: bool
    stage: Stage
    issue: Builder
    edge: Callable[[str, str], Ops]
    edge_unit: Callable[[str], ShardedUnit]
    rows_wait: Callable[[], None]
    _opened: dict[str, int]
    _make_gradients: Callable[[ShardedUnit, int, str], None]
    _reduce: Callable[[ShardedUnit, Ops], None]
    _release: Callable[[ShardedUnit, str, Ops], None]
    _last: ShardedUnit | None = None

    def forward_order(self, layer: int, chunk: int) -> Sequence[int]:
        """Layers, of which `layer` is one, the next of which are gathered ahead in a forward: FSDP2's groups
        are told so one after the other (`set_modules_to_forward_prefetch`)."""
        layers, extra = self.stage.chunks[chunk], self.stage.extra
        if self.copied and chunk == len(self.stage.chunks) - 1:
            return [*layers, *extra]
        return [layer] if layer in extra else layers

    def normed(self) -> Ops:
        """What a final norm waits for whose cross entropy comes later: the head too, of its group."""
        return self.edge("head", "forward")

    def begin(self) -> None:
        """Before the backward of the embedding."""

    def projected(self, template: Template, layer: int, phase: str, ready: Ops) -> Ops:
        """What is before such a layer runs."""
        waits, hooks = self.projecting(template, layer, phase)
        looks_up = phase == "forward" and self._apart
        if looks_up:  # FSDP2 gathers the embedding's group for each lookup, and frees it after it
            waits = (*waits, *self.edge("embedding", phase))
        done = self.issue.play(template, layer, (*ready, *waits), hooks)
        if looks_up:
            self._release(self.edge_unit("embedding"), phase, done)
        if phase == "backward" and not self.adds_in_place:
            self.rows_wait()
        if phase == "backward" and layer == self.stage.extra.start and self._last is not None:
            self._reduce(self._last, done)
            self._last = None
        return done

    def whole(self, unit: ShardedUnit, ready: Ops) -> None:
        """FSDP2's gradients of an edge are all there. Head and final norm, of one group, run first for the
        model and then for each MTP layer, so their backward is over when that of these layers is
        (FSDPParamGroup.pre_forward hooks the first input): they stay until then, with the head's gradient."""
        if unit.component != "vocabulary" or not self.stage.extra:
            self._reduce(unit, ready)
            return
        if unit.name not in self._opened:
            self._make_gradients(unit, unit.numel, "backward")
        self._last = unit

    @property
    def _apart(self) -> bool:
        """Whether the embedding is a group of its own, as torch's FSDP2 has it."""
        return self.copied and self.stage.is_first and not self.c.one_weight

    def projecting(self, template: Template, layer: int, phase: str) -> tuple[Ops, Hooks]:
        """What the projection before such a layer, a lookup among it, waits for, and what happens beside."""
        return (), {}
