"""What a stage's shards do around MTP layers, which predict further tokens and live beside the loss."""

from collections.abc import Callable, Sequence

from mopsim.program.builder import Builder
from mopsim.program.stage import Stage
from mopsim.program.template import Hooks, Ops, Template


class FurtherLayers:
    """Their parameters are gathered when they run. adds_in_place: whether the two gradients of a hidden state
    that such a layer reads are one buffer."""

    adds_in_place = False
    stage: Stage
    issue: Builder
    edge: Callable[[str, str], Ops]
    rows_wait: Callable[[], None]

    def forward_order(self, layer: int, chunk: int) -> Sequence[int]:
        """Layers, of which `layer` is one, the next of which are gathered ahead in a forward."""
        return [layer] if layer in self.stage.extra else self.stage.chunks[chunk]

    def normed(self) -> Ops:
        """What a final norm waits for whose cross entropy comes later: the head too, of its group."""
        return self.edge("head", "forward")

    def begin(self) -> None:
        """Before the backward of the embedding."""

    def projected(self, template: Template, layer: int, phase: str, ready: Ops) -> Ops:
        """What is before such a layer runs."""
        waits, hooks = self.projecting(template, layer, phase)
        done = self.issue.play(template, layer, (*ready, *waits), hooks)
        if phase == "backward" and not self.adds_in_place:
            self.rows_wait()
        return done

    def projecting(self, template: Template, layer: int, phase: str) -> tuple[Ops, Hooks]:
        """What the projection before such a layer, a lookup among it, waits for, and what happens beside."""
        return (), {}
