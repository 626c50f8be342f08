"""Routed experts of a fixed room for each sequence, which products with masks fill and read (GShard's
dispatch and combine, arXiv 2006.16668)."""

from dataclasses import dataclass

from msgspec.structs import replace

from mopsim.graph.tape import Kernel, Matmul, Value

LAID_OUT = 4
"""Bytes moved for each byte of the rows before the experts' products, and after them: on the two sides of an
exchange they are laid out by expert, of which it sends parts, and by expert of all sequences (XLA,
gpu_layout_assignment.cc: what an all-to-all splits is most major; so are the batches of a product)."""
MASK_PASSES, MASK_BACKWARD = 3, 2
"""Over one of both masks: each is written, the weighted one read for the other (MaxText, layers/moe.py,
generate_masks, whose one-hot rows XLA fuses). Back: its gradient is read with it, for the weights'."""


@dataclass(frozen=True)
class Rooms:
    """Of a rank: sequences, tokens of each, rows of all experts that each has room for; hidden: of a row."""

    sequences: float
    tokens: float
    slots: float
    hidden: int

    @property
    def rows(self) -> float:
        return self.sequences * self.slots


def by_masks(kernels: tuple[Kernel, ...], rooms: Rooms, b: int) -> tuple[Kernel, ...]:
    """A layer's kernels, of which rows go to the rooms of all experts by a product with a mask of tokens and
    rooms, and come back by one with the mask of their weights, so that no pass weighs them. The first mask
    has no gradient: which row goes where is no number."""
    if not any(one.name == "permute" for one in kernels):
        return kernels
    return tuple(part for one in kernels for part in _masked(one, rooms, b))


def _masked(kernel: Kernel, rooms: Rooms, b: int) -> tuple[Kernel, ...]:
    size = round(rooms.rows * rooms.tokens * b)
    whole = round(rooms.rows * rooms.hidden * b)
    if kernel.name == "permute":
        masks = (Value("dispatch_mask", size, grad=False), Value("combine_mask", size))
        product = Matmul(rooms.slots, rooms.hidden, rooms.tokens, rooms.sequences, False, constant=True)
        made = Kernel(
            "masks", "memory_bound", kernel.component, ("choice", "weight"), masks,
            bytes=float(MASK_PASSES * size), back_bytes=float(MASK_BACKWARD * size),
        )  # fmt: skip
        return made, _product(kernel, product, "dispatch_mask", _of(kernel, whole))
    if kernel.name == "accumulate":
        product = Matmul(rooms.tokens, rooms.hidden, rooms.slots, rooms.sequences, False)
        return (_product(kernel, product, "combine_mask", kernel.writes, kernel.reads[:1]),)
    if kernel.name in ("sort", "unsort"):
        moved = float(LAID_OUT * whole)
        return (replace(kernel, bytes=moved, back_bytes=moved, launches=2, indexed=False),)
    if kernel.name == "combine":
        return (replace(kernel, writes=_of(kernel, whole)),)
    return (kernel,)


def _of(kernel: Kernel, size: int) -> tuple[Value, ...]:
    """What it writes, of another size where it is a tensor of its own."""
    return tuple(replace(one, bytes=size) if one.bytes else one for one in kernel.writes)


def _product(
    kernel: Kernel, product: Matmul, mask: str, writes: tuple[Value, ...], keeps: tuple[str, ...] = ()
) -> Kernel:
    """A product with a mask in a permutation's place."""
    return Kernel(
        kernel.name, "matmul", kernel.component, (*kernel.reads, mask), writes, saves=(*keeps, mask),
        matmuls=(product,),
    )  # fmt: skip
