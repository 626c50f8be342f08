"""Traffic of a kernel in passes over its tensor."""

from dataclasses import dataclass

from msgspec.structs import replace

from mopsim.graph.tape import Kernel, Step


@dataclass(frozen=True, slots=True)
class TensorPasses:
    """Passes over a tensor in the compute dtype and in fp32, and the kernels that make them."""

    narrow: int
    wide: int
    launches: int


def traffic(passes: TensorPasses, narrow: float, wide: float) -> float:
    """Bytes, of a tensor of `narrow` bytes in the compute dtype and `wide` in fp32."""
    return passes.narrow * narrow + passes.wide * wide


def scratch(size: float) -> tuple[Step, ...]:
    """Bytes that are there while a kernel runs."""
    return (("activations", int(size)),)


def scaled(steps: tuple[Step, ...], times: float) -> tuple[Step, ...]:
    """Allocations so many times as large."""
    return tuple((category, round(size * times)) for category, size in steps)


def instead(kernel: Kernel, wider: float, forward: TensorPasses, backward: TensorPasses) -> Kernel:
    size = sum(value.bytes for value in kernel.writes)
    return replace(
        kernel, bytes=traffic(forward, size, size * wider), launches=forward.launches,
        back_bytes=traffic(backward, size, size * wider), back_launches=backward.launches,
    )  # fmt: skip


def beside(kernel: Kernel, size: float, forward: TensorPasses | None, backward: TensorPasses) -> Kernel:
    """Beside what the kernel does already."""
    back, launches = kernel.back_moved + backward.narrow * size, kernel.back_starts + backward.launches
    found = replace(kernel, back_bytes=back, back_launches=launches)
    if forward is None:
        return found
    return replace(
        found, bytes=kernel.bytes + forward.narrow * size, launches=kernel.launches + forward.launches
    )
