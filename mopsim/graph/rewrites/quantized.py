"""What is kept of the operands of products: of inputs in 8 or 4 bits the cast copy that the weight gradient
reads; of weights under autocast their casts."""

from collections.abc import Collection, Sequence

from msgspec.structs import replace

from mopsim.graph.rewrites.recompute import DISCARDED, members
from mopsim.graph.rewrites.tensor_passes import each
from mopsim.graph.tape import Kernel, Tape, Value
from mopsim.spec.kernels import EXACT


def quantized(
    tape: Tape, share: float, modules: Sequence[str], within: Collection[str], exact: Collection[str] = EXACT
) -> Tape:
    """The tape with a cast copy, `share` of the bytes of what is cast, kept for each product instead of its
    input (Transformer Engine saves the columnwise copy of an input, never the input).

    modules: recomputed ones. A product whose input such a module makes and discards keeps the input, which is
    made again (Megatron-Core sets save_original_input there). within: as in `plan`. exact: components
    whose products are not cast.
    """
    values = tape.values
    places = {i for module in modules if module in DISCARDED for i in members(tape, module, within)}
    again = {value.name for i in places for value in tape.kernels[i].writes}

    def change(kernel: Kernel) -> Kernel:
        if not (kernel.matmuls and kernel.saves) or kernel.component in exact or kernel.saves[0] in again:
            return kernel
        return _cast(kernel, values[kernel.saves[0]], share)

    return replace(tape, kernels=tuple(map(change, tape.kernels)))


def cast_once(kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """Of products that read one value the first casts it (a compiler makes equal casts once)."""
    places = tuple(enumerate(kernels))
    first = {one.reads[0]: place for place, one in reversed(places) if one.matmuls}
    return tuple(
        replace(one, casts=False) if one.matmuls and first[one.reads[0]] < place else one
        for place, one in places
    )


def cast_from_kept(kernels: tuple[Kernel, ...], share: float, exact: Collection[str]) -> tuple[Kernel, ...]:
    """Products whose weight gradient reads a cast that a compiler makes again from what a norm or a gate has
    kept for its own backward; of what keeps nothing (a copy) the cast is kept, `share` of its bytes."""
    makers = {value.name: kernel for kernel in kernels for value in kernel.writes}

    def change(kernel: Kernel) -> Kernel:
        maker = makers.get(kernel.saves[0]) if kernel.matmuls and kernel.saves else None
        if maker is None or kernel.component in exact or maker.kind != "memory_bound":
            return kernel
        if maker.saves:
            return replace(kernel, saves=(*maker.saves, *kernel.saves[1:]))
        return _cast(kernel, maker.writes[0], share)

    return tuple(map(change, kernels))


def weights_cast(kernels: tuple[Kernel, ...], narrow: float, exact: Collection[str]) -> tuple[Kernel, ...]:
    """Products whose cast weights, `narrow` bytes for each, stay from the forward to the backward."""
    sizes = ((one, weights_narrow(one, narrow, exact)) for one in kernels)
    return tuple(
        one.keeping(Value(f"{one.name}_narrow", size, "gathered", grad=False)) if size else one
        for one, size in sizes
    )


def weights_narrow(kernel: Kernel, narrow: float, exact: Collection[str]) -> int:
    """Bytes of a product's cast weights, `narrow` bytes for each."""
    cast = kernel.component not in exact
    return int(sum(one.elements for one in kernel.matmuls if one.weight) * narrow) if cast else 0


def _cast(kernel: Kernel, source: Value, share: float) -> Kernel:
    copy = Value(f"{kernel.name}_in", int(source.bytes * share), source.category, grad=False)
    return replace(kernel, writes=(*kernel.writes, copy), saves=(copy.name, *kernel.saves[1:]))


def under_autocast(kernels: tuple[Kernel, ...], wider: float) -> tuple[Kernel, ...]:
    """Each product's weight is cast before it, and the cast is kept for the backward, in which the weight's
    gradient is cast back. wider: an element of a weight over one of its cast; 1: none is cast. Casts live as
    long as what saved them (torch, aten/src/ATen/autocast_mode.cpp, cached_cast); those of no_grad, to the
    end of the forward, are not counted."""

    def one(kernel: Kernel) -> tuple[Kernel, ...]:
        if not (kernel.matmuls and kernel.weight_grad):
            return (kernel,)
        moved, cast = kernel.weight_grad * (1 + wider), f"{kernel.name}_cast"
        weight = Value(cast, kernel.weight_grad, "gathered", grad=False)
        made = Kernel(cast, "memory_bound", kernel.component, (), (), bytes=moved, back_bytes=moved)
        return made.keeping(weight), kernel

    return each(kernels, one) if wider > 1 else kernels
