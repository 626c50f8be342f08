"""Routed experts of ranks that gather all tokens and pick theirs (Megatron-Core's allgather dispatcher)."""

from mopsim.graph.region import gather, scatter
from mopsim.graph.shapes import Shapes
from mopsim.graph.tape import Kernel, Tape, Value
from mopsim.spec.model import ModelSpec

GROUP = "expert_ranks"
"""All ranks that split the experts, whole ones and parts."""
_C, _D = "experts", "dispatch"


def gathered(model: ModelSpec, shapes: Shapes, rows: int, ranks: int) -> tuple[Tape, Tape]:
    """h -> rows, and out -> f, of `ranks` that gather their tokens with the probabilities and the map of all
    experts. A rank picks the `rows` of its experts by index and adds what they give to zeros for every token;
    the sums are scattered in the router's dtype (Megatron-LM d98e8a64,
    megatron/core/transformer/moe/token_dispatcher.py, MoEAllGatherTokenDispatcher).
    """
    tokens, row, wide = shapes.tokens, model.expert_width * shapes.width, shapes.wide
    size, picked = tokens * ranks * row, rows * row
    routes = float(tokens * ranks * model.num_local_experts)
    there = (
        gather("dispatch", "h", Value("everyone", size, _D), _C, GROUP),
        Kernel(
            "all routes", "all_gather", "router", (), (), bytes=routes * (wide + 1), back_bytes=routes * wide,
            back_kind="reduce_scatter", launches=2, back_launches=1, group=GROUP,
        ),
        _by_index("sort", "everyone", "rows", picked, picked),
        _zeros("sort_zeros", 0.0, float(size)),
    )  # fmt: skip
    sums = size // shapes.width * wide
    back = (
        _zeros("unsort_zeros", float(size), 0.0),
        _by_index("unsort", "out", "partial", picked, size),
        _pass("widen", "partial", Value("wide", sums, _D), size + sums),
        scatter("combine", "wide", Value("returned", sums // ranks, _D), sums, _C, GROUP),
        _pass("accumulate", "returned", Value("f", 0), 2 * tokens * row),
    )
    first, last = Value("h", tokens * row), Value("out", picked, _D)
    return Tape((first,), there, ("rows",)), Tape((last,), back, ("f",), consumes=("out",))


def _by_index(name: str, source: str, out: str, picked: int, size: int) -> Kernel:
    """Rows that an index picks, or is added to; its backward is the other."""
    return Kernel(
        name, "memory_bound", _C, (source,), (Value(out, size, _D),), bytes=2.0 * picked,
        back_bytes=2.0 * picked, indexed=True,
    )  # fmt: skip


def _pass(name: str, source: str, out: Value, moved: int) -> Kernel:
    """A cast, which its backward undoes."""
    return Kernel(
        name, "memory_bound", _C, (source,), (out,), bytes=float(moved), back_bytes=float(moved)
    )  # fmt: skip


def _zeros(name: str, forward: float, backward: float) -> Kernel:
    """What rows are added to."""
    return Kernel(
        name, "memory_bound", _C, (), (), bytes=forward, back_bytes=backward, launches=int(forward > 0),
        back_launches=int(backward > 0),
    )  # fmt: skip
