"""Least-loaded placement, a rewrite of a layer's tape: weights of moved experts travel before its rows."""

from dataclasses import dataclass

from msgspec.structs import replace

from mopsim.graph.tape import Kernel, Tape, Value

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
    the rows their ranks. reads: what it reads before each chunk is sent. sent: copies that the busiest rank
    sends of its own experts.
    """

    received: int
    own: int
    message: int
    launches: int = 0
    reads: int = 0
    sent: int = 0


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
    """Grouped products that take their weights from the `packed` tensor, which lives to the last of them, the
    first to make its gradient."""
    last = [kernel for kernel in kernels if kernel.kind == "grouped_matmul"][-1]

    def changed(kernel: Kernel) -> Kernel:
        reads = (*kernel.reads, "packed") if kernel is last else kernel.reads
        return replace(kernel, reads=reads, saves=(*kernel.saves, "packed"))

    return tuple(changed(kernel) if kernel.kind == "grouped_matmul" else kernel for kernel in kernels)


def rows_read(moved: Migration) -> Kernel:
    """The host reads how many rows of a later chunk go to each rank, once all that it started is done."""
    return Kernel("rows read", "memory_bound", _R, (), (), launches=moved.reads, back_launches=0)
