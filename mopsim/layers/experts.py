"""The tapes of a router and of routed experts: choose, send (dispatch), multiply (grouped), send back
(combine)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mopsim.layers.tape import Kernel, Matmul, Step, Tape, Value
from mopsim.spec.model import ModelSpec

_C, _R = "experts", "router"


PLAN_LAUNCHES = 3
"""What the host starts for each expert when it places rows: its load is read twice, its routes are cut out.
This and the next three are counted in the published code of arXiv 2601.17111 (LeastLoadedEP,
llep/gpt_oss_llep.py)."""
RANK_READS = 5
"""What the host reads for each rank before a chunk is sent: the rank's loads, and its rows once for each of
four exchanges (rows, weights and indices there, results back)."""
PIECE_LAUNCHES = 5
"""For each piece of a divided expert: two comparisons of positions, their product, whether any is left, and
its reading."""
DIVIDED_LAUNCHES = 2 + 2 * 7
"""For each divided expert: the positions of its routes; two pieces have rows of any one rank, and get them by
a mask (its count and indices, two gathers, a fill and a store)."""


@dataclass(frozen=True)
class Migration:
    """Weights that least-loaded placement moves in a layer, in bytes of the compute dtype.

    received: of other ranks' experts on the busiest rank. own: of that rank's experts. message: what the rank
    that sends or receives most has on the wire. launches: what the host starts to make the plan and to give
    the rows their ranks. reads: what it reads before each chunk is sent.
    """

    received: int
    own: int
    message: int
    launches: int = 0
    reads: int = 0


def host_work(experts: int, ranks: int, divided: int, pieces: int) -> tuple[int, int]:
    """(launches, reads) of a layer whose rows are placed: `divided` of its experts have `pieces` in all."""
    plan = PLAN_LAUNCHES * experts
    return plan + PIECE_LAUNCHES * pieces + DIVIDED_LAUNCHES * divided, RANK_READS * ranks


def migration(moved: Migration) -> Tape:
    """Rows are placed by the host, weights of moved experts go to the ranks that need them (`migrated`) and
    into one tensor with the rank's own (`packed`), as a grouped product takes them; the backward sends their
    gradients home."""
    packed = moved.own + moved.received
    kernels = (
        Kernel(
            "place", "memory_bound", _R, (), (), launches=moved.launches + moved.reads, back_launches=0,
        ),
        Kernel(
            "migrate", "send_recv" if moved.message else "view", _C, (),
            (Value("migrated", moved.received, "gathered"),), bytes=float(moved.message), group="experts",
        ),
        Kernel(
            "pack", "memory_bound", _C, ("migrated",), (Value("packed", packed, "gathered"),),
            saves=("migrated",), bytes=2.0 * packed, back_bytes=3.0 * packed,
        ),
    )  # fmt: skip
    return Tape((), kernels, ("packed",))


def migrating(kernels: tuple[Kernel, ...], moved: Migration) -> tuple[Kernel, ...]:
    """A layer's kernels whose weights of moved experts travel before its rows do."""
    first = next(i for i, kernel in enumerate(kernels) if kernel.name == "permute")
    return (*kernels[:first], *migration(moved).kernels, *on_packed(kernels[first:]))


def on_packed(kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """Grouped products that take their weights from the `packed` tensor."""
    return tuple(
        replace(kernel, reads=(*kernel.reads, "packed"), saves=(*kernel.saves, "packed"))
        if kernel.kind == "grouped_matmul"
        else kernel
        for kernel in kernels
    )


def router(model: ModelSpec, tokens: int, b: int, wide: int) -> Tape:
    """h [n,H] -> choices [n,k] and weights [n,k]: logits in at least fp32, scores, biased top-k."""
    H, E, k = model.hidden_size, model.num_local_experts, model.num_experts_per_tok
    scores = tokens * E * wide
    kernels = (
        Kernel(
            "router",
            "matmul",
            _R,
            ("h",),
            (Value("router_logits", scores),),
            saves=("h",),
            matmuls=(Matmul(tokens, E, H),),
            weight_grad=E * H * wide,
            scratch=((("activations", tokens * H * wide),) if wide != b else ()),
            back_scratch=((("activations", tokens * H * wide),) if wide != b else ()),
        ),
        Kernel(
            "scores",
            "memory_bound",
            _R,
            ("router_logits",),
            (Value("scores", scores),),
            saves=("scores",),
            bytes=2 * scores,
        ),
        Kernel(
            "top_k",
            "memory_bound",
            _R,
            ("scores",),
            (Value("choice", tokens * k * 8, grad=False), Value("weight", tokens * k * wide)),
            saves=("choice",),
            bytes=3 * scores,
            launches=6,
            back_launches=4,
            scratch=(("activations", scores),),
            back_scratch=(("activations", scores),),
        ),
    )
    return Tape((Value("h", tokens * H * b),), kernels, ("choice", "weight"))


def dispatch(model: ModelSpec, tokens: int, routes: int, b: int, wide: int, split: bool) -> Tape:
    """Rows of h in route order and over the wire: `tokens` x k routes leave, `routes` arrive (category
    dispatch)."""
    row = model.hidden_size * b
    sent = tokens * model.num_experts_per_tok
    arrived = routes if split else sent
    kernels = [
        Kernel(
            "permute",
            "memory_bound",
            _C,
            ("h",),
            (Value("sent", sent * row, "dispatch"),),
            bytes=2 * sent * row,
            launches=4,
            indexed=True,
        ),
    ]
    if split:
        kernels.append(
            Kernel(
                "dispatch",
                "all_to_all",
                _C,
                ("sent",),
                (Value("arrived", arrived * row, "dispatch"),),
                bytes=float(max(sent, arrived) * row),
                group="experts",
            )
        )
    else:
        kernels.append(
            Kernel("dispatch", "view", _C, ("sent",), (Value("arrived", 0, "dispatch"),), launches=0)
        )
    kernels.append(
        Kernel(
            "sort",
            "memory_bound",
            _C,
            ("arrived",),
            (Value("rows", arrived * row, "dispatch"),),
            bytes=2 * arrived * row,
            launches=2,
            indexed=True,
        )
    )
    return Tape((Value("h", tokens * row),), tuple(kernels), ("rows",))


def experts(
    model: ModelSpec, routes: Sequence[int], b: int, wide: int, tensor: int = 1, fused: bool = False
) -> Tape:
    """Grouped products over rows sorted by expert. routes: rows of each of this rank's experts.

    fused: gate and up in one product, and SwiGLU applies the route weights, so that no output is kept.
    """
    H, inner = model.hidden_size, model.moe_intermediate_size / tensor
    if fused:
        return _fused(model, routes, inner, b, wide)
    total = sum(routes)
    row, wing = H * b, int(inner * b)
    rows, act, out = (
        Value("rows", total * row, "dispatch"),
        Value("act", total * wing),
        Value("out", total * row, "dispatch"),
    )
    kernels = []
    if model.ffn_matrices == 3:
        for name in ("gate", "up"):
            kernels.append(
                _grouped(f"experts_{name}", "rows", Value(name, total * wing), routes, inner, H, b)
            )
        kernels.append(
            Kernel(
                "experts_silu",
                "memory_bound",
                _C,
                ("gate",),
                (Value("silu", total * wing),),
                saves=("gate",),
                bytes=2.0 * total * wing,
            )
        )
        kernels.append(
            Kernel(
                "experts_gated",
                "memory_bound",
                _C,
                ("silu", "up"),
                (act,),
                saves=("silu", "up"),
                bytes=3.0 * total * wing,
                back_launches=2,
            )
        )
    else:
        kernels.append(_grouped("experts_up", "rows", Value("up", total * wing), routes, inner, H, b))
        kernels.append(
            Kernel(
                "experts_gelu", "memory_bound", _C, ("up",), (act,), saves=("up",), bytes=2.0 * total * wing
            )
        )
    kernels.append(
        _grouped("experts_down", "act", Value("down", total * row, "dispatch"), routes, H, inner, b)
    )
    kernels.append(
        Kernel(
            "route_weight",
            "memory_bound",
            _C,
            ("down",),
            (out,),
            saves=("down",),
            bytes=2.0 * total * row,
            back_launches=3,
        )
    )
    return Tape((rows,), tuple(kernels), ("out",), consumes=("rows",))


def _fused(model: ModelSpec, routes: Sequence[int], inner: float, b: int, wide: int) -> Tape:
    H, total = model.hidden_size, sum(routes)
    size, wings = int(total * inner * b), 2 if model.ffn_matrices == 3 else 1
    rows, out = Value("rows", total * H * b, "dispatch"), Value("out", total * H * b, "dispatch")
    wide_value, act = Value("gate_up", wings * size), Value("act", size)
    kernels = (
        _grouped("experts_up", "rows", wide_value, routes, wings * inner, H, b),
        Kernel(
            "experts_act", "memory_bound", _C, ("gate_up",), (act,), saves=("gate_up",),
            bytes=(wings + 1) * size, back_bytes=(2 * wings + 1) * size,
        ),
        _grouped("experts_down", "act", out, routes, H, inner, b),
    )  # fmt: skip
    return Tape((rows,), kernels, ("out",), consumes=("rows",))


def combine(model: ModelSpec, tokens: int, routes: int, b: int, split: bool) -> Tape:
    """Results back to the tokens' ranks and summed over the k routes of a token."""
    row = model.hidden_size * b
    sent = tokens * model.num_experts_per_tok
    arrived = routes if split else sent
    kernels = [
        Kernel(
            "unsort",
            "memory_bound",
            _C,
            ("out",),
            (Value("back", arrived * row, "dispatch"),),
            bytes=2.0 * arrived * row,
            indexed=True,
        )
    ]
    if split:
        kernels.append(
            Kernel(
                "combine",
                "all_to_all",
                _C,
                ("back",),
                (Value("returned", sent * row, "dispatch"),),
                bytes=float(max(sent, arrived) * row),
                group="experts",
            )
        )
    else:
        kernels.append(
            Kernel("combine", "view", _C, ("back",), (Value("returned", 0, "dispatch"),), launches=0)
        )
    kernels.append(
        Kernel(
            "accumulate",
            "memory_bound",
            _C,
            ("returned",),
            (Value("f", 0),),
            bytes=2.0 * sent * row + tokens * row,
            indexed=True,
        )
    )
    return Tape((Value("out", arrived * row, "dispatch"),), tuple(kernels), ("f",), consumes=("out",))


def _grouped(name: str, source: str, out: Value, routes: Sequence[int], n: float, k: float, b: int) -> Kernel:
    """One product per expert; experts with equal rows are counted together."""
    sizes: dict[int, int] = {}
    for rows in routes:
        if rows:
            sizes[rows] = sizes.get(rows, 0) + 1
    matmuls = tuple(Matmul(m, n, k, count) for m, count in sizes.items())
    grad: tuple[Step, ...] = ()
    return Kernel(
        name, "grouped_matmul", _C, (source,), (out,), saves=(source,), matmuls=matmuls,
        weight_grad=int(len(routes) * n * k * b), back_scratch=grad,
    )  # fmt: skip
