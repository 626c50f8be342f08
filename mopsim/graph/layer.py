"""The tape of a whole decoder layer with fused kernels, as Megatron-Core and compiled graphs run it."""

from collections.abc import Collection, Sequence
from math import comb

from msgspec.structs import replace

from mopsim.graph.attention import attention, linear, norm, residual
from mopsim.graph.experts import beside_rows, combine, dispatch, experts, router
from mopsim.graph.ffn import ffn
from mopsim.graph.gathered import gathered
from mopsim.graph.linear_attention import linear_attention
from mopsim.graph.region import gather, scatter
from mopsim.graph.shapes import Shapes
from mopsim.graph.tape import Kernel, Tape, Value
from mopsim.spec.model import ModelSpec


def decoder_layer(
    model: ModelSpec,
    shapes: Shapes,
    layer: int,
    routes: Sequence[int] = (),
    split: bool = False,
    deduplicated: bool = False,
    beside: Collection[str] = (),
    gathers: int = 0,
) -> Tape:
    """x [N,H] -> z [N,H]. routes: rows of each expert of this rank, empty for a dense layer.

    split: experts are spread over ranks, so that rows travel. deduplicated: the kernels of the exchange take
    rows as they lie and sum what returns (DeepEP, HybridEP), so that no copy for each route is made.
    beside: what travels beside rows (Kernels.beside_rows). gathers: ranks whose tokens all of them gather
    instead.
    """
    N, H, b = shapes.tokens, model.hidden_size, shapes.width
    moe = bool(routes)
    part = "experts" if moe else "dense_ffn"
    first = mixer(model, shapes, layer)
    if model.layer_kind(layer).bare:
        return _bare(first)
    second = norm("ffn_norm", "y", "u", N, H, b, "router" if moe else "dense_ffn")
    how = (split, deduplicated, beside, gathers)
    third = _moe(model, shapes, routes, *how) if moe else _dense(model, shapes)
    add = residual("ffn_residual", "f", "y", Value("z", N * H * b), model, shapes, part)
    return Tape(first.inputs, (*first.kernels, second, *third, add), ("z",))


def mixer(model: ModelSpec, shapes: Shapes, layer: int) -> Tape:
    """x [N,H] -> y [N,H]: what of a layer mixes tokens."""
    return linear_attention(model, shapes) if model.is_linear(layer) else attention(model, shapes, layer)


def _bare(tape: Tape) -> Tape:
    """A layer that is a mixer and nothing after: x -> z."""
    kernels = tuple(one.renamed(lambda old: "z" if old == "y" else old) for one in tape.kernels)
    return Tape(tape.inputs, kernels, ("z",))


def mtp_projection(model: ModelSpec, shapes: Shapes) -> Tape:
    """Hidden state and next token's embedding, normed, [N,2H] -> x [N,H] (arXiv 2412.19437 2.2)."""
    N, H, b = shapes.tokens, model.hidden_size, shapes.width
    size = N * H * b
    kernels = (
        Kernel(
            "mtp_embedding", "memory_bound", "embedding", (), (Value("e", size),), bytes=2 * size,
            back_bytes=3 * size,
        ),
        norm("mtp_embedding_norm", "e", "en", N, H, b, "vocabulary"),
        norm("mtp_hidden_norm", "x", "xn", N, H, b, "vocabulary"),
        Kernel(
            "mtp_pair", "memory_bound", "vocabulary", ("en", "xn"), (Value("pair", 2 * size),),
            bytes=4 * size, back_bytes=4 * size,
        ),
        linear("mtp_projection", "pair", Value("z", size), N, H, 2 * H, b, "vocabulary"),
    )  # fmt: skip
    return Tape((Value("x", size),), kernels, ("z",))


def _dense(model: ModelSpec, shapes: Shapes) -> tuple[Kernel, ...]:
    return _renamed(ffn(model, model.intermediate_size, "dense_ffn", shapes), "ffn_", {"h": "u", "f": "f"})


def _moe(
    model: ModelSpec, shapes: Shapes, routes: Sequence[int], split: bool, deduplicated: bool,
    beside: Collection[str], gathers: int = 0,
) -> tuple[Kernel, ...]:  # fmt: skip
    """Router, shared experts, dispatch, routed experts, combine: f is the sum."""
    if shapes.whole_experts and shapes.expert_tensor > 1 and shapes.sequence_parallel:
        return _whole(model, shapes, routes, split, beside)
    N, H, b, wide = shapes.tokens, model.hidden_size, shapes.width, shapes.wide
    arrived = sum(routes) // shapes.expert_tensor
    keep = {"h": "u"}
    found = _renamed(router(model, N, b, wide), "", keep)
    shared = model.shared_expert_intermediate_size if shapes.fused else 0
    if shared:
        tape = ffn(model, shared, "shared_experts", shapes)
        found += _renamed(tape, "shared_", keep) + _shared_gate(model, shapes)
    W, latent = model.expert_width, around_latent(model, shapes).kernels
    if latent:
        found, keep = (*found, latent[0]), {"h": "latent"}
    rows, home = dispatch(model, N, arrived, b, split), combine(model, N, arrived, b, split)
    if gathers:
        rows, home = gathered(model, shapes, sum(routes), gathers)
    sent = _renamed(rows, "sent_", keep | {"rows": "rows", "weight": "weight"})
    if split and deduplicated:
        once = min(arrived, _distinct(model, N, len(routes))) * W * b
        copy = replace(sent[0].sized(lambda _: 0), kind="view", bytes=0, launches=0)  # the exchange's own
        sent = (copy, sent[1].sized(lambda _: once), *sent[2:])
    if split and not gathers:
        ranks = model.num_local_experts // len(routes) * shapes.expert_tensor
        found += beside_rows(model, max(N * model.num_experts_per_tok, arrived), ranks, beside)
    found += sent if gathers else _same_back(sent)
    whole = shapes.fused and not shapes.separate  # experts lie in no tensor-parallel region
    products = _unweighted(experts(model, routes, b, shapes.expert_tensor, whole).kernels)
    if shapes.expert_tensor > 1 and not gathers:
        products = _tensor_parallel(products, arrived * W * b, shapes.expert_tensor, len(routes) > 1)
    found += products
    back = _renamed(home, "back_", {"out": "out"})
    if split and deduplicated:
        back = (*back[:-2], back[-2].sized(lambda _: N * W * b), replace(back[-1], bytes=2.0 * N * W * b))
    back = back if gathers else _same_back(back)
    found += (*back[:-1], *_home(model, back[-1], N * H * b, latent[1:], bool(shared)))
    return found if shapes.fused else _shared_after(model, shapes, found)


def around_latent(model: ModelSpec, shapes: Shapes) -> Tape:
    """u [N,H] -> latent [N,W] before routed experts, and their sum latent_sum [N,W] -> f [N,H] after them;
    nothing where experts work on the whole width. Every rank has both weights whole (Megatron-Core 00119989,
    transformer/moe/moe_layer.py, fc1_latent_proj and fc2_latent_proj: TELinear, "duplicated")."""
    N, H, W, b = shapes.tokens, model.hidden_size, model.expert_width, shapes.width
    u, inner = Value("u", N * H * b), Value("latent_sum", N * W * b)
    kernels = (
        linear("latent_down", "u", Value("latent", N * W * b), N, W, H, b, "experts"),
        linear("latent_up", "latent_sum", Value("f", N * H * b), N, H, W, b, "experts"),
    )
    return Tape((u, inner), kernels if model.moe_latent_size else (), ("f",))


def _home(
    model: ModelSpec, last: Kernel, size: int, latent: tuple[Kernel, ...], shared: bool
) -> tuple[Kernel, ...]:
    """The sum of a token's routes (`last`), to which the output of shared experts is added: in one kernel, or
    after the product that follows it. size: bytes of f."""
    last, read = replace(last, reads=("back_returned",)), (_shared(model),) if shared else ()
    if not latent:
        return (replace(last, reads=(*last.reads, *read), writes=(Value("f", size),)),)
    (product,) = latent
    last = replace(last, writes=(Value("latent_sum", size // model.hidden_size * model.expert_width),))
    if not shared:
        return last, product
    return last, replace(product, writes=(Value("routed", size),)), _shared_sum(model, size)


def _whole(
    model: ModelSpec, shapes: Shapes, routes: Sequence[int], split: bool, beside: Collection[str]
) -> tuple[Kernel, ...]:
    """Experts split like the rest: tokens of all tensor-parallel ranks are gathered, each rank routes and
    sends all of them, through its part of every expert, and scatters the sum of the parts. Back, what left
    has its gradient summed, of which each rank takes its own tokens' (autograd on local tensors)."""
    ranks, size = shapes.tensor, shapes.region_tokens * model.hidden_size * shapes.width
    part = replace(
        model,
        moe_intermediate_size=model.moe_intermediate_size // shapes.expert_tensor,
        shared_expert_intermediate_size=model.shared_expert_intermediate_size // ranks,
    )
    alone = replace(shapes, tokens=shapes.region_tokens, tensor=1, expert_tensor=1)
    inner = Tape((Value("u", size),), _moe(part, alone, routes, split, False, beside), ("f",))
    kernels = list(_renamed(inner, "", {"u": "ug", "f": "fp"}))
    place = next(index for index, kernel in enumerate(kernels) if kernel.name == "dispatch")
    sent = kernels[place].reads[0]
    total = float(size // model.hidden_size * model.expert_width * model.num_experts_per_tok)
    kernels.insert(
        place,
        Kernel("routes_sum", "all_reduce", "experts", (sent,), (), back_bytes=total, group="expert_tensor"),
    )
    whole = gather("gather_tokens", "u", Value("ug", size), "experts")
    return (
        replace(whole, back_bytes=0.0),
        *kernels,
        scatter("scatter_tokens", "fp", Value("f", size // ranks), size, "experts"),
    )


def _shared_after(model: ModelSpec, shapes: Shapes, kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """Shared experts run once the routed ones have, whose sum theirs is added to."""
    width, size = model.shared_expert_intermediate_size, shapes.tokens * model.hidden_size * shapes.width
    if not width:
        return kernels
    tape = ffn(model, width, "shared_experts", shapes)
    routed = replace(kernels[-1], writes=(Value("routed", size),))
    shared = _renamed(tape, "shared_", {"h": "u"}) + _shared_gate(model, shapes)
    return (*kernels[:-1], routed, *shared, _shared_sum(model, size))


def _shared_sum(model: ModelSpec, size: int) -> Kernel:
    return Kernel(
        "shared_sum", "memory_bound", "shared_experts", ("routed", _shared(model)), (Value("f", size),),
        bytes=3.0 * size, back_bytes=0.0, back_launches=0,
    )  # fmt: skip


def _shared(model: ModelSpec) -> str:
    """The value that shared experts add."""
    return "shared_gated" if model.shared_expert_gate else "shared_f"


def _shared_gate(model: ModelSpec, shapes: Shapes) -> tuple[Kernel, ...]:
    """A product of one column and its sigmoid, by which the output of shared experts is scaled."""
    if not model.shared_expert_gate:
        return ()
    N, H, b = shapes.tokens, model.hidden_size, shapes.width
    size, component = N * H * b, "shared_experts"
    return (
        linear("shared_gate", "u", Value("shared_logit", N * b), N, 1, H, b, component),
        Kernel(
            "shared_sigmoid", "memory_bound", component, ("shared_logit",), (Value("shared_share", N * b),),
            saves=("shared_share",), bytes=2.0 * N * b,
        ),
        Kernel(
            "shared_scale", "memory_bound", component, ("shared_share", "shared_f"),
            (Value("shared_gated", size),), saves=("shared_share", "shared_f"), bytes=2.0 * size,
            back_bytes=6.0 * size, back_launches=3, back_scratch=(("activations", size),),
        ),
    )  # fmt: skip


def _unweighted(kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """Products without a pass for the route weights: SwiGLU applies them, or the sum of a token's routes."""
    if kernels[-1].name != "route_weight":
        return kernels
    return (*kernels[:-2], replace(kernels[-2], writes=kernels[-1].writes))


def _distinct(model: ModelSpec, tokens: int, local: int) -> int:
    """Tokens that arrive at a rank with `local` experts which gets each once: those of all ranks that choose
    at least one of its experts. Choices are taken as even, whatever the routing: which rank gets most differs
    from layer to layer, and what is kept of them is kept of all."""
    experts, chosen = model.num_local_experts, model.num_experts_per_tok
    none = comb(experts - local, chosen) / comb(experts, chosen)
    return round(tokens * experts / local * (1 - none))


def _same_back(kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """The backward of a permutation is a permutation."""
    return tuple(
        replace(kernel, back_bytes=kernel.bytes) if kernel.kind == "memory_bound" else kernel
        for kernel in kernels
    )


def _tensor_parallel(kernels: tuple[Kernel, ...], size: int, ranks: int, several: bool) -> tuple[Kernel, ...]:
    """Rows of all ranks that split an expert are gathered before and scattered after (`size` bytes); between
    the order of ranks and that of `several` experts they are copied: of what is scattered before, and of what
    is gathered for the backward after the local rows' gradient is gone, so that one of the two is there
    beside the copy.
    """
    whole, out = Value("rows_g", size * ranks, "dispatch"), Value("out", size, "dispatch")
    kernels = tuple(
        replace(one, reads=("rows_g",), saves=("rows",)) if one.reads == ("rows",) else one for one in kernels
    )
    last = replace(kernels[-1], writes=(Value("out_p", size * ranks, "dispatch"),))
    before = gather("gather_rows", "rows", whole, "experts", "expert_tensor")
    after = scatter("scatter_rows", "out_p", out, size * ranks, "experts", "expert_tensor")
    whole_copy, beside = (("dispatch", size * ranks),), (("dispatch", size * (ranks - 1)),)
    if several:
        before = replace(before, scratch=whole_copy, back_scratch=beside)
        after = replace(after, scratch=beside, back_scratch=beside)
    return (before, *kernels[:-1], last, after)


def _renamed(tape: Tape, prefix: str, keep: dict[str, str]) -> tuple[Kernel, ...]:
    """The tape's kernels with `prefix` before the names of its values, apart from those in `keep`."""
    return tuple(one.renamed(lambda old: keep.get(old, prefix + old)) for one in tape.kernels)
