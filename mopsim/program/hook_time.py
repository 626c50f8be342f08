"""The host's time of hooks around every module that gather and free its parameters (DeepSpeed's ZeRO-3)."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from math import inf
from typing import NamedTuple

from mopsim.graph.host_costs import HOOKS, Costs
from mopsim.program.context import Context
from mopsim.program.units import joined_name
from mopsim.spec.model import ModelSpec
from mopsim.spec.tensors import Tensor, layer_tensors

STAYS = 1e5
"""A parameter of fewer elements is gathered once and stays (DeepSpeed, runtime/zero/config.py,
param_persistence_threshold)."""
BARE = {"attention": 2, "router": 1, "dense_ffn": 2, "shared_experts": 2, "experts": 2, "expert": 2}
"""Modules without a parameter of their own, in transformers (models/llama, qwen3_moe, deepseek_v3): the layer
and its attention; the block of experts; an FFN, all experts or one of them, each with its activation."""


class Hooked(NamedTuple):
    """Modules of a component; parameters of theirs that stay, as small ones do; elements of those, one by
    one, that come and go."""

    modules: int
    kept: int
    gathered: tuple[int, ...] = ()


def hooks_of(context: Context) -> Costs:
    """Linears that hooks add to a forward and a backward of each component; `expert`: to those of each expert
    that is a module of its own. Nothing where parameters are not sharded, or not by such hooks."""
    if not (context.stack.host.hooks and context.shards_params):
        return {}
    separate = context.stack.kernels.gate_up == "separate"
    room = (context.stack.sharding.reduce_buffer or inf) / context.b
    costs = HOOKS[context.stack.host.hooks]
    return {
        name: _linears(one, room, costs) for name, one in hooked(context.model, separate=separate).items()
    }


def hooked(model: ModelSpec, *, separate: bool) -> dict[str, Hooked]:
    """What there is to hook in each component of a layer, of which norm and residual are part: of the first
    dense layer and of the first with experts. separate: a projection for queries, keys and values each, and
    for gate and up; experts that are tensors of one module have gate and up in one."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    for moe in (True, False):
        layers = [one for one in range(model.num_hidden_layers) if model.is_moe_layer(one) == moe]
        own = layer_tensors(model, layers[0], "", moe) if layers else []
        known = set(found)
        for tensor in own:
            if tensor.component not in known:
                found[tensor.component].append(tensor)
    parts = {name: _hooked(BARE[name], own, separate) for name, own in found.items() if name != "experts"}
    if experts := [one for one in found["experts"] if one.routed]:
        around = _hooked(BARE["experts"], (one for one in found["experts"] if not one.routed), separate)
        together = _hooked(0, experts, separate=False)
        kept, gathered = around.kept + together.kept, around.gathered + together.gathered
        parts["experts"] = Hooked(around.modules, kept, gathered)
        parts["expert"] = _hooked(BARE["expert"], experts, separate, model.num_local_experts)
    return parts


def _hooked(bare: int, own: Iterable[Tensor], separate: bool, count: int = 1) -> Hooked:
    """count: experts that the tensors are of; one of them is meant."""
    sizes = Counter[str]()
    for tensor in own:
        sizes[tensor.name if separate else joined_name(tensor.name)] += tensor.numel // count
    modules = sum(name.endswith((".weight", "_proj")) for name in sizes)
    gathered = tuple(size for size in sizes.values() if size >= STAYS)
    return Hooked(bare + modules, len(sizes) - len(gathered), gathered)


def _linears(what: Hooked, room: float, costs: Costs) -> tuple[float, float]:
    """room: elements that are reduced together; one more reduction for each weight that is larger."""
    counts = (what.modules, what.kept, len(what.gathered))
    parts = ("module", "kept", "gathered")
    ahead, back = (
        sum(count * costs[part][at] for count, part in zip(counts, parts, strict=True)) for at in (0, 1)
    )
    return ahead, back + costs["reduction"][1] * sum(min(1.0, size / room) for size in what.gathered)
