"""The host's time of layers made of Python modules, put on the ops of a program (mopsim.graph.host_costs)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from msgspec import structs

from mopsim.common.units import DTYPE_BYTES
from mopsim.graph import host_costs
from mopsim.program.context import Context
from mopsim.program.hook_time import hooks_of
from mopsim.program.packed import ordered_pieces
from mopsim.program.side_by_side import abreast
from mopsim.program.workload import Op, Program, Work
from mopsim.spec.layer_fields import LINEAR
from mopsim.spec.model import ModelSpec
from mopsim.spec.stack import Stack
from mopsim.spec.strategy import Strategy

NOTHING, WHOLE = (0.0, 0.0), (1.0, 0.0)


@dataclass(frozen=True)
class Around:
    """What of a job the host's time of layers depends on. hooks: what they add to each component (hooks_of).
    split: see split_of. kinds: see kinds_of. experts: of a rank;
    apart: those of them that are modules of their own, each as a dense FFN is. again: of each component that
    is recomputed in part, that part of its forward, and Linears of modules that were measured alone. abreast:
    sequences that go through a layer one by one. linear: layers whose mixer is linear attention; -1: those of
    templates. ordered: pieces of documents in order, by phase (ordered_pieces)."""

    hooks: host_costs.Costs = field(default_factory=dict)
    split: host_costs.Costs = field(default_factory=dict)
    kinds: host_costs.Costs = field(default_factory=dict)
    experts: int = 0
    apart: int = 0
    again: host_costs.Costs = field(default_factory=dict)
    abreast: int = 1
    linear: frozenset[int] = frozenset()
    ordered: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        context: Context,
        again: Mapping[str, tuple[float, float, tuple[str, ...]]],
        *,
        woven: bool,
        layer: int | None = None,
    ) -> "Around":
        """Of a job. again: `Passes.again`; woven: see kinds_of. layer: of a template of this layer's ops."""
        stack, model = context.stack, context.model
        split = split_of(model, stack, context.strategy)
        kinds = kinds_of(model, stack, context.strategy, woven=woven)
        measured = stack.host.layers == "transformer_engine"
        found = {
            component: (rest, sum(_alone(module, context) for module in modules))
            if measured
            else (share, 0.0)
            for component, (share, rest, modules) in again.items()
        }
        hooks = hooks_of(context)
        layers = filter(model.is_linear, range(model.num_hidden_layers) if layer is None else (layer,))
        linear = frozenset(index if layer is None else -1 for index in layers)
        experts = context.own_experts, context.expert_modules
        return cls(hooks, split, kinds, *experts, found, abreast(context), linear, _ordered(context, again))


def _ordered(context: Context, again: Mapping[str, tuple[float, float, tuple[str, ...]]]) -> dict[str, float]:
    """Linears of putting documents in order: torch's own, so ON_A_DEVICE is not of them."""
    ahead, back = (ordered_pieces(context) * cost for cost in host_costs.ORDERED)
    _, rest, modules = again.get("attention", (1.0, 1.0, ()))
    return {"forward": ahead, "backward": back, "recompute": ahead * ("core_attn" in modules or rest)}


def maps_routes(strategy: Strategy, stack: Stack) -> bool:
    """Whether torch turns what has arrived into a map of experts (Kernels.routes_map)."""
    return strategy.experts.token_dispatcher == "deepep" and stack.kernels.routes_map == "composed"


def by_modules(program: Program, stack: Stack, around: Around) -> Program:
    """The program with what the host does in each pass of a layer beside starting its kernels."""
    layers = (op.index for op in program.ops if op.layer >= 0)
    return replace(program, ops=hosted(program.ops, layers, stack, around))


def kinds_of(
    model: ModelSpec, stack: Stack, strategy: Strategy | None = None, *, woven: bool = False
) -> host_costs.Costs:
    """Linears that a network's kind of layers adds to each component of the plain one; a strategy's
    context-parallel ranks to attention, its dispatcher to experts. `LINEAR`: to the attention of layers whose
    mixer is linear attention, in place of what is added to the others'. woven: `Context.weaves`."""
    linear = _of_mixers(model, stack, strategy)
    if strategy and stack.host.layers in host_costs.EXCHANGED:
        routed = strategy.experts
        sends = routed.expert_parallel > 1 and routed.token_dispatcher == "alltoall"
        return linear | ({"experts": host_costs.EXCHANGED[stack.host.layers]} if sends else {})
    if stack.host.layers != "transformer_engine":
        return linear
    latent = model.kv_lora_rank > 0
    turned = _turned(model) * (stack.kernels.rotary not in ("fused", "by_token"))
    rotary = "latent_rotary" if latent else "rotary"
    mine = {
        "attention": ("latent",) * latent,
        "router": ("sigmoid",) * (model.scoring_func == "sigmoid") + ("groups",) * (model.n_group > 1),
        "shared_experts": ("shared_experts",),
    }
    found = {component: [host_costs.KINDS[kind] for kind in kinds] for component, kinds in mine.items()}
    more = stack.host.documents - 1.0
    for (ahead, back), times in ((host_costs.KINDS[rotary], 1.0), (host_costs.DOCUMENTS[rotary], more)):
        found["attention"].append((turned * times * ahead, turned * times * back))
    found["attention"] += _of_context(strategy) if strategy else []
    ranks = strategy.experts.expert_parallel if strategy else 1
    found["experts"] = _of_experts(model, stack, model.num_local_experts // ranks)
    if strategy and stack.kernels.row_sums == "gathered" and stack.host.permutes == "triton":
        found["experts"] += [host_costs.LAUNCHES.get(strategy.experts.token_dispatcher, NOTHING)]
    if strategy and ranks > 1:
        found["experts"] += [host_costs.DISPATCHERS.get(strategy.experts.token_dispatcher, NOTHING)]
        found["experts"] += [host_costs.ROUTES_MAP] * maps_routes(strategy, stack)
        found["experts"] += [host_costs.WOVEN[stack.host.delayed_grads]] * woven
    return linear | {component: _sum(costs) for component, costs in found.items()}


def _turned(model: ModelSpec) -> float:
    """Part of the layers of softmax attention that have rotary positions."""
    softmax = [layer for layer in range(model.num_hidden_layers) if not model.is_linear(layer)]
    return sum(map(model.rotates, softmax)) / max(len(softmax), 1)


def _sum(costs: Sequence[host_costs.Pair]) -> host_costs.Pair:
    return sum(ahead for ahead, _ in costs), sum(back for _, back in costs)


def _of_mixers(model: ModelSpec, stack: Stack, strategy: Strategy | None) -> host_costs.Costs:
    """What layers of linear attention add, where the modules of this kind were measured."""
    known = host_costs.MIXERS.get(stack.host.layers, {})
    kind = model.linear_attention.kind
    if kind not in known:
        return {}
    split = strategy is not None and strategy.attention.context_parallel > 1
    return {LINEAR: _sum([known[kind]] + [known["context"]] * split)}


def split_of(model: ModelSpec, stack: Stack, strategy: Strategy) -> host_costs.Costs:
    """Linears that tensor-parallel ranks add to each component of a layer. What DTensor adds to kinds of
    attention and to experts is known of the modules of `host_costs.EXCHANGED`; a compiler's graph of
    attention has the same operators of plain tensors."""
    how, layers = strategy.experts, stack.host.layers
    if strategy.dense.tensor_parallel == 1 or stack.host.tensor == "plain":
        return {}
    if stack.host.tensor == "transformer_engine":
        return host_costs.TENSOR
    if layers not in host_costs.EXCHANGED:
        return host_costs.DTENSOR
    kinds, found = host_costs.DTENSOR_KINDS, dict(host_costs.DTENSOR)
    if layers == "functional" and model.kv_lora_rank:
        found["attention"] = kinds["latent"]
    elif layers == "functional" and model.qk_norm == "head":
        found["attention"] = kinds["head_norms"]
    sends, split = how.expert_parallel > 1, how.expert_tensor_parallel > 1
    if sends or split:
        found["experts"] = kinds["exchanged" * sends + "_" * (sends and split) + "split" * split]
        found["shared_experts"] = kinds["shared_experts"]
    return found


def _of_context(strategy: Strategy) -> list[tuple[float, float]]:
    """What the exchange of a sequence adds."""
    ranks = strategy.attention.context_parallel
    cost = host_costs.CONTEXT[strategy.attention.cp_comm_type]
    return [cost["layer"], *[cost["rank"]] * ranks] if ranks > 1 else []


def _alone(module: str, context: Context) -> float:
    """Linears of a module that its backward runs again: the core of attention with its exchange of a
    sequence, the experts' activation with its clamps."""
    more = _of_context(context.strategy) if module == "core_attn" else []
    more = _clamps(context.model, context.stack) if module == "moe_act" else more
    return sum(host_costs.KINDS[f"{host_costs.MODULES_AGAIN[module]}_again"]) + sum(cost[0] for cost in more)


def _clamps(model: ModelSpec, stack: Stack) -> list[tuple[float, float]]:
    return [host_costs.CLAMPS] * (bool(model.swiglu_limit) and stack.kernels.clamped_gate == "apart")


def _of_experts(model: ModelSpec, stack: Stack, experts: int) -> list[tuple[float, float]]:
    """What biases and clamps of the experts of a rank add."""
    biases = model.expert_bias and stack.kernels.expert_bias == "scaled"
    return (
        _clamps(model, stack)
        + ([host_costs.BIASES["layer"]] + [host_costs.BIASES["expert"]] * experts) * biases
    )


def hosted(given: Sequence[Op], places: Iterable[int], stack: Stack, around: Around) -> tuple[Op, ...]:
    """Ops with what the host does in each pass of a layer, whose ops are at these places.

    It lies on one op of each component, in the middle of those on the compute stream. Where modules are of
    layers with routed experts alone, others take nothing.
    """
    if stack.host.modules == "routed":
        places = tuple(places)
        routed = {given[place].layer for place in places if given[place].component == "experts"}
        places = [place for place in places if given[place].layer in routed]
    layers = host_costs.LAYER.keys() | around.kinds.keys() | around.split.keys()
    passes: dict[tuple[int, int, str], dict[str, list[int]]] = {}
    groups, last = dict[str, list[int]](), (-1, -1, "")
    for place in places:
        op = given[place]
        if op.stream == "compute" and op.component in layers and op.work:
            if op.layer != last[1] or op.phase != last[2] or op.microbatch != last[0]:
                last = op.microbatch, op.layer, op.phase
                groups = passes.setdefault(last, {})
            group = groups.get(op.component)
            if group is None:
                groups[op.component] = [place]
            else:
                group.append(place)
    ops, more = list(given), dict[tuple[object, ...], float]()
    known: dict[tuple[int, float], tuple[Work, ...]] = {}  # equal work stays one object, priced once
    every = ((key[2], *one) for key, groups in passes.items() for one in groups.items())
    for phase, component, group in every:
        linear = given[group[0]].layer in around.linear
        alike = (phase, component, linear, *[id(given[place].work) for place in group])
        if alike not in more:
            more[alike] = _more(phase, component, [given[place] for place in group], stack, around)
        if more[alike] > 0:
            middle = group[len(group) // 2]
            work, same = ops[middle].work, (id(ops[middle].work), more[alike])
            if same not in known:
                known[same] = (structs.replace(work[0], host=work[0].host + more[alike]), *work[1:])
            ops[middle] = structs.replace(ops[middle], work=known[same])
    return tuple(ops)


def _more(phase: str, component: str, ops: Sequence[Op], stack: Stack, around: Around) -> float:
    """What the host does in a pass of a component beside starting the kernels of its ops."""
    tensor = around.split
    checkpoint = host_costs.CHECKPOINT if stack.sharding.copies else 0.0
    back = phase == "backward"
    part, alone = around.again.get(component, WHOLE) if phase == "recompute" else WHOLE
    costs = _costs(ops, stack.host.layers)
    experts, apart = (around.experts, around.apart) if component == "experts" and part == 1.0 else (0, 0)
    whole = costs.get(component, NOTHING)[back] + experts * costs.get("expert", NOTHING)[back]
    whole += apart * host_costs.LAYER["dense_ffn"][back]
    kind = LINEAR if component == "attention" and ops[0].layer in around.linear else component
    whole = part * (whole + around.kinds.get(kind, NOTHING)[back]) + alone
    whole *= host_costs.ON_A_DEVICE.get(stack.host.layers, 1.0) * around.abreast
    whole += around.ordered.get(phase, 0.0) * (kind == "attention")
    started = sum(work.calls for op in ops for work in op.work if work.kind == "grouped_matmul")
    whole += started * stack.host.products
    whole += checkpoint if phase == "recompute" and component == "attention" else 0.0
    more = max(0.0, whole - sum(sum(work.issued for work in op.work) for op in ops))
    if component in around.hooks:
        own = NOTHING if apart else around.hooks[component]
        more += own[back] + apart * around.hooks.get("expert", NOTHING)[back]
    return more + part * tensor[component][back] if component in tensor else more


def _costs(ops: Sequence[Op], layers: str) -> host_costs.Costs:
    """Linears of layers of whose passes these are: more in 8 bits."""
    products = [work for op in ops for work in op.work if work.kind in ("matmul", "grouped_matmul")]
    return host_costs.LAYERS[layers][any(DTYPE_BYTES.get(work.dtype, 2) < 2 for work in products)]
