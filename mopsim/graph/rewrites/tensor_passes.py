"""Operations as a few kernels of torch's: their traffic in passes over tensors, and what they keep."""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain

from msgspec.structs import replace

from mopsim.common.io import Spec
from mopsim.common.shipped import named_in
from mopsim.graph.tape import Kernel, Step, Strided, Value

JOINED = 0.58
"""Time of an element of halves that torch.cat puts together, over one that is followed by strides (cost/
rates.yaml)."""


class TensorPasses(Spec, frozen=True, kw_only=True):
    """Passes over a tensor in the compute dtype and in fp32, and the kernels that make them.

    strided, joined: elements that these follow by strides, or put together, over the tensor's; along,
    along_wide: the passes of such kernels, among the others (see Strided).
    """

    narrow: float = 0.0
    wide: float = 0.0
    launches: int = 0
    strided: float = 0.0
    joined: float = 0.0
    along: float = 0.0
    along_wide: float = 0.0

    @property
    def elements(self) -> float:
        """That are followed by strides, by the time of these, over the tensor's."""
        return self.strided + self.joined * JOINED

    def by_strides(self, narrow: float, wide: float) -> Strided:
        """Of a tensor of these bytes in the compute dtype and in fp32."""
        return Strided(self.elements * narrow, self.along * narrow + self.along_wide * wide)


class ComposedKernel(Spec, frozen=True, kw_only=True):
    """How a program composes an operation: an entry of composed.yaml. forward, backward: passes over its
    output.

    keeps: tensors that are kept beside what it reads: a name, and times the output's size in the compute
    dtype and in fp32. whole: whether what it reads is kept. working, back_working: tensors in these dtypes
    that are there while it runs. gradients: category of the halves' gradients, in one tensor. gated: of
    gated activations alone; ungated: what it is without a gate, if not what it was. of_each: kernels of each
    expert in it, forward and backward. what: these kernels, in words. source: file, program or release that
    they are read from; empty where `what` names plain operators of torch.
    """

    forward: TensorPasses = TensorPasses()
    backward: TensorPasses
    keeps: tuple[tuple[str, float, float], ...] = ()
    whole: bool = True
    working: tuple[float, float] = (0.0, 0.0)
    back_working: tuple[float, float] = (0.0, 0.0)
    gradients: str = ""
    gated: bool = False
    ungated: "ComposedKernel | None" = None
    of_each: tuple[int, int] = (0, 0)
    what: str
    source: str = ""

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
        found = instead(kernel, wider, self)
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


def charged(kernel: Kernel, how: ComposedKernel, narrow: float, wide: float = 0) -> Kernel:
    """The kernel as such passes over tensors of these bytes."""
    there, back = how.forward, how.backward
    return replace(
        kernel, bytes=traffic(there, narrow, wide), launches=there.launches,
        back_bytes=traffic(back, narrow, wide), back_launches=back.launches,
        strided=there.by_strides(narrow, wide), back_strided=back.by_strides(narrow, wide),
    )  # fmt: skip


def instead(kernel: Kernel, wider: float, how: ComposedKernel) -> Kernel:
    """The kernel as such passes over what it writes."""
    size = sum(value.bytes for value in kernel.writes)
    return charged(kernel, how, size, size * wider)


def beside(kernel: Kernel, size: float, how: ComposedKernel) -> Kernel:
    """Beside what the kernel does already."""
    there, back = how.forward, how.backward
    return replace(
        kernel, bytes=kernel.bytes + there.narrow * size, launches=kernel.launches + there.launches,
        back_bytes=kernel.back_moved + back.narrow * size, back_launches=kernel.back_starts + back.launches,
        strided=kernel.strided + there.by_strides(size, 0),
        back_strided=kernel.back_strided + back.by_strides(size, 0),
    )  # fmt: skip


def each(
    kernels: Sequence[Kernel], change: Callable[[Kernel], Iterable[Kernel]], *names: str
) -> tuple[Kernel, ...]:
    """The kernels that take the place of each, or of those of these names."""
    changed = (change(one) if not names or one.name in names else (one,) for one in kernels)
    return tuple(chain.from_iterable(changed))


def made(kernels: Iterable[Kernel]) -> dict[str, Value]:
    """What they write, by name."""
    return {value.name: value for kernel in kernels for value in kernel.writes}


COMPOSED = named_in("mopsim.graph.rewrites", ComposedKernel, "composed.yaml")()
"""By name."""
