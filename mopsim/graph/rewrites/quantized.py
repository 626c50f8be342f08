"""What is kept of the inputs of products in 8 or 4 bits: the cast copy that the weight gradient reads."""

from collections.abc import Collection, Sequence

from msgspec.structs import replace

from mopsim.graph.rewrites.recompute import DISCARDED, members
from mopsim.graph.tape import Kernel, Tape, Value

EXACT = ("router", "vocabulary")
"""Components whose products stay in the compute dtype under an 8-bit or 4-bit recipe."""


def quantized(tape: Tape, share: float, modules: Sequence[str], within: Collection[str]) -> Tape:
    """The tape with a cast copy, `share` of the bytes of what is cast, kept for each product instead of its
    input (Transformer Engine saves the columnwise copy of an input, never the input).

    modules: recomputed ones. A product whose input such a module makes and discards keeps the input, which is
    made again (Megatron-Core sets save_original_input there). within: as in `plan`.
    """
    values = tape.values
    places = {i for module in modules if module in DISCARDED for i in members(tape, module, within)}
    again = {value.name for i in places for value in tape.kernels[i].writes}
    kernels = []
    for kernel in tape.kernels:
        saved = kernel.saves[0] if kernel.saves else ""
        if kernel.matmuls and kernel.component not in EXACT and saved not in again:
            kernels.append(_cast(kernel, values[saved], share))
        else:
            kernels.append(kernel)
    return replace(tape, kernels=tuple(kernels))


def cast_once(kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """Of products that read one value the first casts it (a compiler makes equal casts once)."""
    found, seen = [], set[str]()
    for kernel in kernels:
        source = kernel.reads[0] if kernel.matmuls else ""
        found.append(replace(kernel, casts=False) if source in seen else kernel)
        seen |= {source} - {""}
    return tuple(found)


def cast_from_kept(kernels: tuple[Kernel, ...], share: float) -> tuple[Kernel, ...]:
    """Products whose weight gradient reads a cast that a compiler makes again from what a norm or a gate has
    kept for its own backward; of what keeps nothing (a copy) the cast is kept, `share` of its bytes."""
    makers = {value.name: kernel for kernel in kernels for value in kernel.writes}
    found: list[Kernel] = []
    for kernel in kernels:
        maker = makers.get(kernel.saves[0]) if kernel.matmuls and kernel.saves else None
        if maker is None or kernel.component in EXACT or maker.kind != "memory_bound":
            found.append(kernel)
        elif maker.saves:
            found.append(replace(kernel, saves=(*maker.saves, *kernel.saves[1:])))
        else:
            found.append(_cast(kernel, maker.writes[0], share))
    return tuple(found)


def weights_cast(kernels: tuple[Kernel, ...], narrow: float) -> tuple[Kernel, ...]:
    """Products whose cast weights, `narrow` bytes for each, stay from the forward to the backward."""
    found: list[Kernel] = []
    for kernel in kernels:
        size = weights_narrow(kernel, narrow)
        if size:
            copy = Value(f"{kernel.name}_cast", size, "gathered", grad=False)
            kernel = replace(kernel, writes=(*kernel.writes, copy), saves=(*kernel.saves, copy.name))
        found.append(kernel)
    return tuple(found)


def weights_narrow(kernel: Kernel, narrow: float) -> int:
    """Bytes of a product's cast weights, `narrow` bytes for each."""
    cast = kernel.component not in EXACT
    return int(sum(one.elements for one in kernel.matmuls if one.weight) * narrow) if cast else 0


def _cast(kernel: Kernel, source: Value, share: float) -> Kernel:
    copy = Value(f"{kernel.name}_in", int(source.bytes * share), source.category, grad=False)
    return replace(kernel, writes=(*kernel.writes, copy), saves=(copy.name, *kernel.saves[1:]))
