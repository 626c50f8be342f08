"""The tapes of a router and of routed experts: choose, send (dispatch), multiply (grouped), send back
(combine)."""

from collections.abc import Collection, Sequence

from msgspec.structs import replace

from mopsim.graph.ffn import activation, fused_activation
from mopsim.graph.tape import Kernel, Matmul, Tape, Value
from mopsim.spec.layout import ceil_div
from mopsim.spec.model import ModelSpec

_C, _R = "experts", "router"
WARP = 32
"""Threads of a warp."""


def router(model: ModelSpec, tokens: int, b: int, wide: int) -> Tape:
    """h [n,H] -> choices [n,k] and weights [n,k]: logits in at least fp32, scores, biased top-k."""
    H, E, k = model.hidden_size, model.num_local_experts, model.num_experts_per_tok
    scores = tokens * E * wide
    cast = (("activations", tokens * H * wide),) if wide != b else ()
    kernels = (
        Kernel(
            "router", "matmul", _R, ("h",), (Value("router_logits", scores),), saves=("h",),
            matmuls=(Matmul(tokens, E, H),), weight_grad=E * H * wide, scratch=cast, back_scratch=cast,
        ),
        Kernel(
            "scores", "memory_bound", _R, ("router_logits",), (Value("scores", scores),), saves=("scores",),
            bytes=2 * scores,
        ),
        Kernel(
            "top_k", "memory_bound", _R, ("scores",),
            (Value("choice", tokens * k * 8, grad=False), Value("weight", tokens * k * wide)),
            saves=("choice",), bytes=3 * scores, launches=6, back_launches=4, ranked=tokens * _ranked(model),
            scratch=(("activations", scores),), back_scratch=(("activations", scores),),
        ),
    )  # fmt: skip
    return Tape((Value("h", tokens * H * b),), kernels, ("choice", "weight"))


def _ranked(model: ModelSpec) -> int:
    """Numbers that are ranked for a token, in warps: its experts' scores, where it is limited to groups of
    them also the groups', and by DeepSeek-V3's method each group's two best."""
    E, groups = model.num_local_experts, model.n_group
    rows = [E]
    if groups > 1:
        rows += [groups, *(groups * [E // groups] if model.topk_method == "noaux_tc" else [])]
    return WARP * sum(ceil_div(row, WARP) for row in rows)


EXCHANGES = ("dispatch", "combine")
"""Kernels that move rows to the ranks of their experts and back."""
BESIDE_ROWS = {"counts": "all counts", "weights": "sent weights"}
"""Kernel of each of what a dispatcher sends beside rows (Kernels.beside_rows of a stack)."""


def dispatch(model: ModelSpec, tokens: int, routes: int, b: int, split: bool) -> Tape:
    """Rows of h in route order and over the wire: `tokens` x k routes leave, `routes` arrive (category
    dispatch). They read their weights where these multiply them."""
    row = model.expert_width * b
    sent = tokens * model.num_experts_per_tok
    arrived = routes if split else sent
    read = [Value("h", tokens * row)]
    if model.expert_inputs_weighted:
        read.append(Value("weight", sent * max(b, 4)))
    reads = tuple(one.name for one in read)
    kernels = (
        Kernel(
            "permute", "memory_bound", _C, reads, (Value("sent", sent * row, "dispatch"),),
            bytes=2 * sent * row, launches=4, indexed=True,
        ),
        _exchange("dispatch", "sent", "arrived", sent * row, arrived * row, split),
        Kernel(
            "sort", "memory_bound", _C, ("arrived",), (Value("rows", arrived * row, "dispatch"),),
            bytes=2 * arrived * row, launches=2, indexed=True,
        ),
    )  # fmt: skip
    return Tape(tuple(read), kernels, ("rows",))


def beside_rows(model: ModelSpec, routes: int, ranks: int, sent: Collection[str]) -> tuple[Kernel, ...]:
    """What is `sent` beside rows (Kernels.beside_rows of a stack): little, but each with a network's delay.
    Each of `ranks` has a count (int64) for every expert, a route a weight (fp32)."""
    counts, weights = 8.0 * model.num_local_experts * ranks, 4.0 * routes
    found = {
        "counts": Kernel(
            BESIDE_ROWS["counts"], "all_gather", _R, (), (), bytes=counts, back_bytes=0.0, group="experts"
        ),
        "weights": Kernel(BESIDE_ROWS["weights"], "all_to_all", _C, (), (), bytes=weights, group="experts"),
    }
    return tuple(kernel for name, kernel in found.items() if name in sent)


def _exchange(name: str, source: str, target: str, leave: int, arrive: int, split: bool) -> Kernel:
    """Rows between the ranks that split the experts, bytes; one rank's own only get another name."""
    if not split:
        return Kernel(name, "view", _C, (source,), (Value(target, 0, "dispatch"),), launches=0)
    return Kernel(
        name, "all_to_all", _C, (source,), (Value(target, arrive, "dispatch"),),
        bytes=float(max(leave, arrive)), group="experts",
    )  # fmt: skip


def with_routes_read(kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """A layer's kernels in which torch turns what arrives into a map of experts (Kernels.routes_map): 22 of
    little, and the host waits for the sizes of masks (Megatron-LM d98e8a64,
    transformer/moe/token_dispatcher.py, `_indices_to_multihot`)."""
    place = 1 + next(i for i, kernel in enumerate(kernels) if kernel.name == EXCHANGES[0])
    read = Kernel("routes read", "memory_bound", _C, (), (), launches=22, back_bytes=0.0)
    return (*kernels[:place], read, *kernels[place:])


def experts(model: ModelSpec, routes: Sequence[int], b: int, tensor: int = 1, fused: bool = False) -> Tape:
    """Grouped products over rows sorted by expert. routes: rows of each of this rank's experts.

    fused: gate and up in one product, and SwiGLU applies the route weights, so that no output is kept.
    """
    H, inner, total = model.expert_width, model.moe_intermediate_size / tensor, sum(routes)
    rows, out = Value("rows", total * H * b, "dispatch"), Value("out", total * H * b, "dispatch")
    wings = ("gate", "up") if model.ffn_matrices == 3 else ("up",)
    if fused:
        wide, act = fused_activation(model, "experts_act", _C, int(total * inner * b))
        up = _grouped("experts_up", "rows", wide, routes, len(wings) * inner, H, b)
        down = _grouped("experts_down", "act", out, routes, H, inner, b)
        return Tape((rows,), (up, act, down), ("out",), consumes=("rows",))
    wing = total * int(inner * b)
    kernels = (
        *(_grouped(f"experts_{name}", "rows", Value(name, wing), routes, inner, H, b) for name in wings),
        *activation(model, "experts_", _C, wing),
        _grouped("experts_down", "act", replace(out, name="down"), routes, H, inner, b),
        Kernel(
            "route_weight", "memory_bound", _C, ("down",), (out,), saves=("down",), bytes=2.0 * out.bytes,
            back_launches=3,
        ),
    )  # fmt: skip
    return Tape((rows,), kernels, ("out",), consumes=("rows",))


def combine(model: ModelSpec, tokens: int, routes: int, b: int, split: bool) -> Tape:
    """Results back to the tokens' ranks and summed over the k routes of a token."""
    row = model.expert_width * b
    sent = tokens * model.num_experts_per_tok
    arrived = routes if split else sent
    kernels = (
        Kernel(
            "unsort", "memory_bound", _C, ("out",), (Value("back", arrived * row, "dispatch"),),
            bytes=2.0 * arrived * row, indexed=True,
        ),
        _exchange("combine", "back", "returned", arrived * row, sent * row, split),
        Kernel(
            "accumulate", "memory_bound", _C, ("returned",), (Value("f", 0),),
            bytes=2.0 * sent * row + tokens * row, indexed=True,
        ),
    )  # fmt: skip
    return Tape((Value("out", arrived * row, "dispatch"),), kernels, ("f",), consumes=("out",))


def routed(
    model: ModelSpec, tokens: int, routes: Sequence[int], b: int, split: bool, tensor: int = 1
) -> Tape:
    """h [n,H] -> f, the sum of its routes: the counts of rows, dispatch, products and combine."""
    there = dispatch(model, tokens, sum(routes), b, split)
    products = experts(model, routes, b, tensor)
    back = combine(model, tokens, sum(routes), b, split)
    size = 8.0 * model.num_local_experts
    counts = Kernel("counts", "all_to_all", _R, (), (), bytes=size, back_bytes=0.0, group="experts")
    return Tape(there.inputs, (counts, *there.kernels, *products.kernels, *back.kernels), ("f",))


def _grouped(name: str, source: str, out: Value, routes: Sequence[int], n: float, k: float, b: int) -> Kernel:
    """One product per expert; experts with equal rows are counted together."""
    sizes: dict[int, int] = {}
    for rows in routes:
        if rows:
            sizes[rows] = sizes.get(rows, 0) + 1
    matmuls = tuple(Matmul(m, n, k, count) for m, count in sizes.items())
    return Kernel(
        name, "grouped_matmul", _C, (source,), (out,), saves=(source,), matmuls=matmuls,
        weight_grad=int(len(routes) * n * k * b),
    )  # fmt: skip
