"""Layers whose sequences go side by side (mopsim.program.side_by_side)."""

from functools import partial

from mopsim.graph.tape import Step
from mopsim.program.builder import Builder
from mopsim.program.context import Context
from mopsim.program.passes import Passes
from mopsim.program.shards import Shards
from mopsim.program.side_by_side import abreast, of_one, woven
from mopsim.program.stage import Stage
from mopsim.program.template import Hooks, Template, merged


class SidePasses(Passes):
    """Templates of layers are woven of those of one sequence; embedding and loss are of the microbatch."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._one, self._count = Passes(of_one(context)), abreast(context)

    def sharding(self, issue: Builder, stage: Stage) -> Shards:
        """What gathers parameters and reduces gradients."""
        return SideShards(self.context, issue, stage)

    def kept(self, layer: int) -> tuple[Step, ...]:
        """What a layer's forward leaves for its backward beside its input and its output, by category."""
        return tuple((category, size * self._count) for category, size in self._one.kept(layer))

    def _forward(self, layer: int) -> Template:
        return woven(self._one.forward(layer), self._count, self.context.b)

    def _backward(self, layer: int) -> Template:
        return woven(self._one.backward(layer), self._count, self.context.b)


class SideShards(Shards):
    """Gradients of routed experts are there from the first sequence's on."""

    def beside(self, template: Template, layer: int, phase: str) -> Hooks:
        """What a layer's parameter groups do while it runs."""
        found = super().beside(template, layer, phase)
        first = template.products("backward")[0]
        if phase == "forward" or layer < 0 or first < 0:
            return found
        inside = filter(self._beside, self._groups(layer))
        made = (partial(self._make_gradients, unit, unit.numel, phase) for unit in inside)
        return merged({first + 1: tuple(made)}, found)
