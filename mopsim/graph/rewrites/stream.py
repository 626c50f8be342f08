"""A residual stream that is wider than the products, as autocast leaves it where weights are in fp32."""

from msgspec.structs import replace

from mopsim.graph.tape import Kernel, Tape, Value

STREAM = ("x", "y", "z")
"""A layer's input, what its attention's residual makes, and its output."""


def widened(tape: Tape, times: int) -> Tape:
    """A layer's tape with that stream `times` as wide. A norm that keeps its input in fp32 keeps the stream
    itself, no copy; sums move as much more as the stream is wider, what norms read more of is left out."""

    def size(one: Value) -> int:
        return one.bytes * times if one.name in STREAM else one.bytes

    def kernel(one: Kernel) -> Kernel:
        copy = f"{one.name}_wide"
        if one.reads and one.reads[0] in STREAM and any(made.name == copy for made in one.writes):
            writes = tuple(made for made in one.writes if made.name != copy)
            one = replace(
                one, writes=writes, saves=(*(name for name in one.saves if name != copy), one.reads[0])
            )
        return (one.moving(times) if one.name.endswith("residual") else one).sized(size)

    inputs = tuple(replace(one, bytes=size(one)) for one in tape.inputs)
    return replace(tape, inputs=inputs, kernels=tuple(map(kernel, tape.kernels)))
