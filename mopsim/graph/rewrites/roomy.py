"""Rows of routed experts in tensors that have room for more of them, and what outlives them elsewhere."""

from msgspec.structs import replace

from mopsim.graph.rewrites.tensor_passes import scaled
from mopsim.graph.tape import Kernel

FIRST, GATE, LAST = "experts_up", "experts_act", "experts_down"


def with_room(kernels: tuple[Kernel, ...], room: float, stash: float) -> tuple[Kernel, ...]:
    """The tensors of routed experts' rows, `room` times as large; a gate of its own takes as much longer,
    products do not. stash: a copy as large as so many times the rows takes the place of what the first
    product and the gate keep, from the last product on and until its backward; 0: there is none."""
    saved = {name for one in kernels if one.name in (FIRST, GATE) for name in one.saves} if stash else set()
    found = [_roomy(one, room, stash, saved) if _of_rows(one) else one for one in kernels]
    made = [value for one in kernels if _of_rows(one) for value in one.writes if value.name in saved]
    beside = tuple((value.category, round(value.bytes * room)) for value in made)
    return tuple(
        replace(one, scratch=(*one.scratch, *beside), back_scratch=(*one.back_scratch, *beside))
        if one.name == LAST and beside
        else one
        for one in found
    )


def all_moved(kernels: tuple[Kernel, ...], room: float, received: bool) -> tuple[Kernel, ...]:
    """The permutations of rows in such tensors, of which a compiled program that knows only the tensors' size
    moves all. received: what an exchange brings is as large too."""
    grown = ("unsort", *(("dispatch",) if received else ()))
    moved = (one.moving(room) if one.name in ("sort", "unsort") else one for one in kernels)
    return tuple(
        one.sized(lambda value: round(value.bytes * room)) if one.name in grown else one for one in moved
    )


def shared_stay(kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """The shared experts' output, which is added to the routed ones', stays until the backward."""
    made = {value.name for one in kernels if one.component == "shared_experts" for value in one.writes}
    return tuple(
        replace(one, saves=(*one.saves, *(name for name in one.reads if name in made)))
        if one.name == "accumulate"
        else one
        for one in kernels
    )


def _of_rows(kernel: Kernel) -> bool:
    return kernel.name == "sort" or kernel.name.startswith("experts_")


def _roomy(kernel: Kernel, room: float, stash: float, saved: set[str]) -> Kernel:
    found = kernel.sized(lambda one: round(one.bytes * (stash if one.name in saved else room)))
    scratch, back_scratch = (scaled(one, room) for one in (kernel.scratch, kernel.back_scratch))
    found = replace(found, scratch=scratch, back_scratch=back_scratch)
    return found if kernel.name != GATE or stash else found.moving(room)
