"""A residual stream that is wider than the products, as autocast leaves it where weights are in fp32."""

from msgspec.structs import replace

from mopsim.graph.tape import Kernel, Tape, Value

STREAM = ("x", "y", "z")
"""A layer's input, what its attention's residual makes, and its output."""


def widened(tape: Tape, times: int, casts: bool = False) -> Tape:
    """A layer's tape with that stream `times` as wide. A norm that keeps its input in fp32 keeps the stream
    itself, no copy; sums move as much more as the stream is wider, what norms read more of is left out.
    casts: a norm's output is cast for each product that reads it, and no compiler makes one kernel of these
    (torch.autocast): it is as wide as the stream, and each of them keeps a cast of its own (torch,
    autocast_mode.cpp: casts are cached of weights alone)."""
    norms = [one for one in tape.kernels if one.name.endswith("norm") and one.reads[0] in STREAM]
    wide = {norm.writes[0].name for norm in norms} if casts else set()
    narrow = [value for norm in norms for value in norm.writes if value.bytes == norm.writes[0].bytes]
    kept = {value.name for value in narrow if value.name.endswith("_normed")}  # others are in fp32 anyway
    larger = {*STREAM, *wide, *(kept if casts else ())}

    def size(one: Value) -> int:
        return one.bytes * times if one.name in larger else one.bytes

    def kernel(one: Kernel) -> Kernel:
        copy = f"{one.name}_wide"
        if one.reads and one.reads[0] in STREAM and any(made.name == copy for made in one.writes):
            writes = tuple(made for made in one.writes if made.name != copy)
            one = replace(
                one, writes=writes, saves=(*(name for name in one.saves if name != copy), one.reads[0])
            )
        if one.name.endswith("_sum") and one.reads and one.reads[0] in wide and one.back_bytes:
            one = replace(one, back_bytes=one.back_bytes * times)
        return (one.moving(times) if one.name.endswith("residual") else one).sized(size)

    inputs = tuple(replace(one, bytes=size(one)) for one in tape.inputs)
    sizes = {value.name: value.bytes for norm in norms for value in norm.writes}
    kernels = (made for one in map(kernel, tape.kernels) for made in _cast(one, wide, sizes, times))
    return replace(tape, inputs=inputs, kernels=tuple(kernels))


def _cast(one: Kernel, wide: set[str], sizes: dict[str, int], times: int) -> tuple[Kernel, ...]:
    """A kernel, after the casts of what it reads of these values where it is a product."""
    read = [name for name in one.reads if name in wide] if one.matmuls else []
    casts = []
    for name in read:
        narrow = Value(f"{one.name}_{name}", sizes[name], "activations")
        moved = float(sizes[name] * (1 + times))
        casts.append(
            Kernel(
                f"{one.name}_narrowed", "memory_bound", one.component, (name,), (narrow,), bytes=moved,
                back_bytes=moved,
            )
        )  # fmt: skip
        one = replace(
            one,
            reads=tuple(narrow.name if was == name else was for was in one.reads),
            saves=tuple(narrow.name if was == name else was for was in one.saves),
        )
    return (*casts, one)
