"""The second half of a split backward (zero bubble, arXiv 2401.10241): gradients of the weights of products,
and their reduction where that is done in every microbatch."""

from collections.abc import Callable, Collection, Mapping
from functools import partial

from mopsim.graph.liveness import gradients
from mopsim.graph.tape import Kernel, Played, Step, Tape
from mopsim.program.builder import Builder
from mopsim.program.context import Context
from mopsim.program.regions import keeps, region
from mopsim.program.shards import Shards
from mopsim.program.taped import TapeDraft
from mopsim.program.template import Hooks, Ops, Template
from mopsim.program.units import ShardedUnit


class SplitShards(Shards):
    """Layers' parameters are gathered and freed around the first half, which needs them; their gradients are
    whole, and reduced, after the second. Of a backward that is not split as without this."""

    def halved(self, halves: bool) -> None:
        """Whether the backward that begins leaves gradients of weights to later."""
        self._makes = "weights" if halves else "backward"

    def beside(self, template: Template, layer: int, phase: str) -> Hooks:
        """What a layer's parameter groups do while its forward or first half runs."""
        if phase == "forward" or layer < 0 or not self.copied or self._makes == "backward":
            return super().beside(template, layer, phase)
        found: dict[int, list[Callable[[int], None]]] = {}
        again, last = template.products("recompute"), template.products("backward")[1]
        for unit in filter(self._beside, self._groups(layer)):
            found.setdefault(max(again[0], 0), []).append(partial(self._arrived, unit))
            found.setdefault(again[1] + 1, []).append(lambda _: self._free_deferred(phase))
            found.setdefault(last + 1, []).append(lambda op, unit=unit: self._release(unit, phase, (op,)))  # type: ignore[misc]
        return found

    def _arrived(self, unit: ShardedUnit, _: int) -> None:
        self._wait(unit, "backward")

    def second(self, template: Template, layer: int) -> Hooks:
        """Before the second half of a layer, and while it runs: full gradients come alive, and those of
        groups inside of another's module are reduced once they are there."""
        units = self._groups(layer)
        whole = [unit for unit in units if not self._copied(unit)]
        if self.each and whole:
            memory = [("gathered_grads", self._full_grad(unit)) for unit in whole]
            self.issue.add("gradients", "compute", "other", "backward", (), (), memory)
        inside = tuple(filter(self._beside, units))

        def reduce(op: int) -> None:
            for unit in inside:
                self._whole(unit, template, (op,))

        return {template.products("backward")[1] + 1: (reduce,)} if inside else {}

    def over(self, template: Template, layer: int, ready: Ops) -> None:
        """The second half of a layer has run."""
        for unit in self._groups(layer) if self.each else ():
            if not self._beside(unit):
                self._whole(unit, template, ready)

    def _whole(self, unit: ShardedUnit, template: Template, ready: Ops) -> None:
        """The gradients of a group are there, those of products made one by one."""
        if self._copied(unit):
            first, last = template.products("backward")
            inside = range(first, last + 1) if first >= 0 else range(0)
            apart = any(one.component == "experts" for one in self._groups(unit.layer))
            mine = unit.component == "experts"
            places = [i for i in range(len(template.memory)) if not apart or (i in inside) == mine]
            made = [step for place in places for step in template.memory[place]]
            self._opened[unit.name] = sum(size for name, size in made if name == "gathered_grads")
        self._reduce(unit, ready)


def second_half(shards: Shards, issue: Builder, template: Template, layer: int) -> Ops:
    """That of a layer, its reductions beside it."""
    if not isinstance(shards, SplitShards):
        return issue.play(template, layer, ())
    ready = issue.play(template, layer, (), shards.second(template, layer))
    shards.over(template, layer, ready)
    return ready


def weight_grads(tape: Tape, context: Context, net: Mapping[str, int], held: Collection[str]) -> Template:
    """The weight gradients of a tape's products, last to first. net: bytes that the first half has left, by
    category; held: their names. Each is freed once no product wants it."""
    draft, values, left = TapeDraft(context, "weight_grad"), tape.values, dict(net)
    sources = {name: kernel for kernel in tape.kernels for name in region(kernel)}
    products = [kernel for kernel in reversed(tape.kernels) if kernel.matmuls]
    wants = {kernel.name: {*kernel.saves, *gradients(tape, kernel)} & set(held) for kernel in products}
    for place, kernel in enumerate(products):
        later = {name for one in products[place + 1 :] for name in wants[one.name]}
        over = [values[name.removeprefix("d/")] for name in sorted(wants[kernel.name] - later)]
        source = sources.get(kernel.reads[0])
        gathered: list[Step] = []
        if source is not None and context.groups[source.group].size > 1 and not keeps(kernel):
            gathered = draft.gather_again(source)
        freed = [(value.category, -value.bytes) for value in over]
        for category, size in freed:
            left[category] = left.get(category, 0) + size
        steps = [*_made(kernel, context), *gathered, *freed]
        draft.join(Played(kernel, True, tuple(steps)), None, "backward")
    draft.close("backward")
    draft.end_with([(category, -size) for category, size in left.items() if size])
    return draft.template(draft.ready)


def _made(kernel: Kernel, context: Context) -> list[Step]:
    """A product's weight gradient: added where it belongs, or, where groups of parameters are reduced, a part
    of what is reduced once all are there."""
    size = kernel.weight_grad
    routed = kernel.kind == "grouped_matmul"
    if not context.stack.sharding.copies or context.strategy.dense.zero < 2:
        stays = 0
    elif routed:
        stays = 0 if context.stack.plain_experts(context.strategy) else size
    else:
        stays = int(sum(one.elements for one in kernel.matmuls if one.weight) * context.b)
    spike = max(0, size - stays)
    found = [("activations", spike), ("activations", -spike)] if spike else []
    return [("gathered_grads", stays), *found] if stays else found
