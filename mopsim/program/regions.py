"""Products of a region whose rows ranks gather before them: what of it is done again in a backward."""

from collections.abc import Sequence

from mopsim.graph.tape import Kernel, Played
from mopsim.program.context import Context


def region(kernel: Kernel) -> tuple[str, ...]:
    """What the products of a region read, where the kernel begins one."""
    if kernel.group not in ("tensor", "expert_tensor"):
        return ()
    if kernel.kind == "all_reduce" and not kernel.writes and not kernel.bytes:
        return kernel.reads
    return tuple(value.name for value in kernel.writes) if kernel.kind == "all_gather" else ()


def keeps(kernel: Kernel) -> bool:
    """Whether a product keeps what it reads, so that its weight gradient needs nothing gathered again."""
    return kernel.reads[0] in kernel.saves


def apart(kernel: Kernel, source: Kernel, context: Context) -> bool:
    """Whether what begins the product's region has a backward of its own, after the gradients of all that
    read its rows."""
    in_turn = context.stack.kernels.region_backward == "in_turn"
    return in_turn and bool(source.writes) and (keeps(kernel) or regathers(kernel, source))


def regathers(kernel: Kernel, source: Kernel) -> bool:
    """Whether experts that ranks split gather rows again for the first of their products' gradients."""
    return source.group == "expert_tensor" and not keeps(kernel)


def still_to_read(later: Sequence[Played], kernel: Kernel) -> int:
    """Products after this one that read the same rows in a backward."""
    return sum(
        item.backward and item.kernel.reads[0] == kernel.reads[0] for item in later if item.kernel.matmuls
    )


def partner(played: Sequence[Played], index: int, source: Kernel, done: set[int]) -> int:
    """Place of the backward of what begins a product's region; 0 where another product took it already."""
    found = (i for i in range(index, len(played)) if played[i].kernel is source and played[i].backward)
    return next((i for i in found if i not in done), 0)
