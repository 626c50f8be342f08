"""Operations as a few kernels of torch's: their traffic in passes over tensors, and what they keep."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from mopsim.graph.tape import Kernel, Step, Strided, Value

JOINED = 0.58
"""Time of an element of halves that torch.cat puts together, over one that is followed by strides (cost/
rates.yaml)."""


@dataclass(frozen=True, slots=True)
class TensorPasses:
    """Passes over a tensor in the compute dtype and in fp32, and the kernels that make them.

    strided: elements that these follow by strides, over the tensor's; along, along_wide: the passes of such
    kernels, among the others (see Strided).
    """

    narrow: float
    wide: float
    launches: int
    strided: float = 0.0
    along: float = 0.0
    along_wide: float = 0.0

    def by_strides(self, narrow: float, wide: float) -> Strided:
        """Of a tensor of these bytes in the compute dtype and in fp32."""
        return Strided(self.strided * narrow, self.along * narrow + self.along_wide * wide)


@dataclass(frozen=True, slots=True)
class ComposedKernel:
    """How torch composes an operation. forward, backward: passes over its output.

    keeps: tensors that are kept beside what it reads: a name, and times the output's size in the compute
    dtype and in fp32. whole: whether what it reads is kept. working, back_working: tensors in these dtypes
    that are there while it runs. gradients: category of the halves' gradients, in one tensor. gated: of
    gated activations alone; ungated: what it is without a gate, if not what it was.
    """

    forward: TensorPasses
    backward: TensorPasses
    keeps: tuple[tuple[str, float, float], ...] = ()
    whole: bool = True
    working: tuple[float, float] = (0.0, 0.0)
    back_working: tuple[float, float] = (0.0, 0.0)
    gradients: str = ""
    gated: bool = False
    ungated: "ComposedKernel | None" = None

    def of(self, kernel: Kernel, wider: float, wings: int) -> Kernel:
        """A kernel as it is composed. wider: an element in fp32 over one in the compute dtype. wings: tensors
        that an activation reads."""
        if self.gated and wings != 2:
            return self.ungated.of(kernel, wider, wings) if self.ungated else kernel
        out = kernel.writes[0]

        def size(narrow: float, wide: float) -> int:
            return int(out.bytes * (narrow + wide * wider))

        kept = (
            replace(out, name=f"{kernel.name}_{name}", bytes=size(narrow, wide), grad=False)
            for name, narrow, wide in self.keeps
        )
        found = instead(kernel, wider, self.forward, self.backward)
        found = (found if self.whole else replace(found, saves=())).keeping(*kept)
        halves = ((self.gradients, wings * out.bytes),) if self.gradients else ()
        back = scratch(size(*self.back_working)) if any(self.back_working) else ()
        return replace(
            found, scratch=scratch(size(*self.working)) if any(self.working) else found.scratch,
            back_scratch=(*back, *halves) or found.back_scratch,
        )  # fmt: skip


def traffic(passes: TensorPasses, narrow: float, wide: float) -> float:
    """Bytes, of a tensor of `narrow` bytes in the compute dtype and `wide` in fp32."""
    return passes.narrow * narrow + passes.wide * wide


def scratch(size: float) -> tuple[Step, ...]:
    """Bytes that are there while a kernel runs."""
    return (("activations", int(size)),)


def scaled(steps: tuple[Step, ...], times: float) -> tuple[Step, ...]:
    """Allocations so many times as large."""
    return tuple((category, round(size * times)) for category, size in steps)


def charged(
    kernel: Kernel, forward: TensorPasses, backward: TensorPasses, narrow: float, wide: float = 0
) -> Kernel:
    """The kernel as such passes over tensors of these bytes."""
    return replace(
        kernel, bytes=traffic(forward, narrow, wide), launches=forward.launches,
        back_bytes=traffic(backward, narrow, wide), back_launches=backward.launches,
        strided=forward.by_strides(narrow, wide), back_strided=backward.by_strides(narrow, wide),
    )  # fmt: skip


def instead(kernel: Kernel, wider: float, forward: TensorPasses, backward: TensorPasses) -> Kernel:
    """The kernel as such passes over what it writes."""
    size = sum(value.bytes for value in kernel.writes)
    return charged(kernel, forward, backward, size, size * wider)


def beside(kernel: Kernel, size: float, forward: TensorPasses | None, backward: TensorPasses) -> Kernel:
    """Beside what the kernel does already."""
    back, launches = kernel.back_moved + backward.narrow * size, kernel.back_starts + backward.launches
    strided = kernel.back_strided + backward.by_strides(size, 0)
    found = replace(kernel, back_bytes=back, back_launches=launches, back_strided=strided)
    if forward is None:
        return found
    return replace(
        found, bytes=kernel.bytes + forward.narrow * size, launches=kernel.launches + forward.launches,
        strided=kernel.strided + forward.by_strides(size, 0),
    )  # fmt: skip


def each(kernels: Sequence[Kernel], change: Callable[[Kernel], Iterable[Kernel]]) -> tuple[Kernel, ...]:
    """The kernels that take the place of each."""
    return tuple(part for kernel in kernels for part in change(kernel))


def made(kernels: Iterable[Kernel]) -> dict[str, Value]:
    """What they write, by name."""
    return {value.name: value for kernel in kernels for value in kernel.writes}
