"""A tape: the kernels of a piece of a model in order, with what each reads, writes and keeps for its
backward.

From one tape come FLOPs, memory traffic, message sizes, and the memory of its runs (mopsim.graph.liveness).
Nothing else in the simulator counts them.
"""

from collections.abc import Callable
from functools import cached_property

from msgspec import Struct
from msgspec.structs import replace

from mopsim.spec.hardware import COLLECTIVES

GATE_CLAMPS = "gate clamps"
"""Kernel of clamps that come before a gate (Kernels.clamped_gate of a stack)."""
Step = tuple[str, int]
"""(category, bytes): an allocation, or a release where negative."""


class Value(Struct, frozen=True):
    """A tensor that a kernel writes. grad: whether a gradient flows back to it, of its size, or of `of_grad`
    bytes: a part of another tensor has none of its own, but its gradient has."""

    name: str
    bytes: int
    category: str = "activations"
    grad: bool = True
    of_grad: int = 0

    @property
    def grad_bytes(self) -> int:
        return self.of_grad or self.bytes


class Matmul(Struct, frozen=True):
    """`count` products C[m,n] = A[m,k] B[k,n]. weight: B is a parameter (its gradient is k x n). constant: A
    has no gradient. frozen: neither has one."""

    m: float
    n: float
    k: float
    count: float = 1
    weight: bool = True
    constant: bool = False
    frozen: bool = False

    @property
    def flops(self) -> float:
        return 2 * self.m * self.n * self.k * self.count

    @property
    def elements(self) -> float:
        """Of B, of all products."""
        return self.n * self.k * self.count


class Strided(Struct, frozen=True):
    """What torch's elementwise kernels follow by strides, element by element: `size` bytes of elements in the
    compute dtype, and the bytes that these kernels move, among the kernel's."""

    size: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Strided") -> "Strided":
        return Strided(self.size + other.size, self.bytes + other.bytes)

    def times(self, times: float) -> "Strided":
        return Strided(self.size * times, self.bytes * times) if self.size else self


class Kernel(Struct, frozen=True):
    """One kernel (or a few small ones launched together).

    kind: a kind of work (mopsim.spec.hardware.WORK_KINDS), or "view" for none. bytes: memory traffic of a
    forward run, or the full buffer of a collective. flops, seq: of attention (causal half counted).
    back_flops: of its backward, unless five products to the forward's two. indexer: of the scores that choose
    keys. saves: values kept for the backward. scratch, back_scratch: (category, bytes) alive inside the
    kernel only. indexed: rows are read or written by index, at an eager framework's rate unless the schedule
    has a kernel of its own for it. ranked: numbers, whole warps of them in a row, of which it finds each
    row's largest. share: of its rows, those that an attention kernel takes at a time. loop: of a loop over
    routed experts, the largest one's rows over all of them: of what it makes for itself alone one's is there
    at a time. weight_grad: bytes of the parameter gradients that its backward makes before they are added to
    the unit's buffer. weighted: whether a norm has a weight. per_row: bytes of one number for each of the
    rows that a norm makes. casts, back_casts: whether it casts its input and its output's gradient, where
    products are in 8 or 4 bits. back_serial: rows that its backward adds to one row, one after the other.
    back_sums: elements that it adds by atomic operations. back_dots: bytes of rows, in the compute dtype,
    whose elements a batched product in fp32 meets with a few rows each. strided, back_strided: see Strided.
    group: whose ranks a collective joins. region: of kernels that run again for their own backward, whatever
    else is recomputed. beside: a collective beside which what follows runs, up to the first kernel that needs
    what it brings.
    """

    name: str
    kind: str
    component: str
    reads: tuple[str, ...]
    writes: tuple[Value, ...]
    saves: tuple[str, ...] = ()
    matmuls: tuple[Matmul, ...] = ()
    bytes: float = 0.0
    flops: float = 0.0
    back_flops: float | None = None
    seq: int = 0
    indexer: bool = False
    share: float = 1.0
    loop: float = 0.0
    launches: int = 1
    back_bytes: float | None = None
    back_launches: int | None = None
    scratch: tuple[Step, ...] = ()
    back_scratch: tuple[Step, ...] = ()
    weight_grad: int = 0
    weighted: bool = True
    per_row: int = 0
    casts: bool = True
    back_casts: bool = True
    indexed: bool = False
    ranked: float = 0.0
    back_serial: float = 0.0
    back_sums: float = 0.0
    back_dots: float = 0.0
    strided: Strided = Strided()
    back_strided: Strided = Strided()
    group: str = ""
    back_kind: str = ""
    region: str = ""
    beside: bool = False

    @property
    def total_flops(self) -> float:
        return self.flops + sum(matmul.flops for matmul in self.matmuls)

    @property
    def back_moved(self) -> float:
        """Bytes that its backward moves, unless told: of a collective as many, of others twice as many."""
        usual = self.bytes if self.kind in COLLECTIVES else 2 * self.bytes
        return usual if self.back_bytes is None else self.back_bytes

    @property
    def back_starts(self) -> int:
        """Kernels that its backward starts."""
        return self.launches if self.back_launches is None else self.back_launches

    def moving(self, times: float) -> "Kernel":
        """With so many times the bytes, both ways."""
        back = None if self.back_bytes is None else self.back_bytes * times
        return replace(
            self, bytes=self.bytes * times, back_bytes=back, strided=self.strided.times(times),
            back_strided=self.back_strided.times(times),
        )  # fmt: skip

    def sized(self, size: Callable[[Value], int]) -> "Kernel":
        """With what it writes as large as `size` says."""
        return replace(self, writes=tuple(replace(one, bytes=size(one)) for one in self.writes))

    def renamed(self, name: Callable[[str], str]) -> "Kernel":
        """With other names of values."""
        return replace(
            self, reads=tuple(map(name, self.reads)), saves=tuple(map(name, self.saves)),
            writes=tuple(replace(one, name=name(one.name)) for one in self.writes),
        )  # fmt: skip

    def keeping(self, *values: Value) -> "Kernel":
        """Which makes these too, for its backward."""
        saves = (*self.saves, *(one.name for one in values))
        return replace(self, writes=(*self.writes, *values), saves=saves)


class Played(Struct, frozen=True):
    """A kernel in one pass, and the memory it moves in order. backward: the reverse pass."""

    kernel: Kernel
    backward: bool
    memory: tuple[Step, ...]


class Tape(Struct, frozen=True, dict=True):
    """Kernels in order. inputs: values made elsewhere. outputs: values that outlive the tape.

    consumes: inputs that nobody else needs, so that they die here. held: (value, kernel) to the end of which
    a forward run keeps it, to its own end without a name; of several for a value, the last counts.
    """

    inputs: tuple[Value, ...]
    kernels: tuple[Kernel, ...]
    outputs: tuple[str, ...]
    consumes: tuple[str, ...] = ()
    held: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        known = {value.name for value in self.inputs}
        for kernel in self.kernels:
            made = [value.name for value in kernel.writes]
            for name in (*kernel.reads, *kernel.saves):
                assert name in known or name in made, f"{kernel.name} reads {name} before it is written"
            for name in made:
                assert name not in known, f"{kernel.name} writes {name} once more"
                known.add(name)

    @property
    def by_name(self) -> dict[str, Kernel]:
        return {kernel.name: kernel for kernel in self.kernels}

    @cached_property
    def values(self) -> dict[str, Value]:
        """By name, the inputs among them."""
        found = {value.name: value for value in self.inputs}
        found.update((value.name, value) for kernel in self.kernels for value in kernel.writes)
        return found

    @property
    def holds(self) -> dict[str, int]:
        """Place of the kernel to the end of which a forward run keeps what is `held`."""
        places = {kernel.name: place for place, kernel in enumerate(self.kernels)}
        last, found = len(self.kernels) - 1, dict[str, int]()
        for name, until in self.held:
            found[name] = max(found.get(name, 0), places.get(until, last))
        return found

    @property
    def outside(self) -> set[str]:
        """Values that this tape neither makes to free nor frees."""
        return {value.name for value in self.inputs} - set(self.consumes) | set(self.outputs)

    @property
    def kept(self) -> set[str]:
        """Values that its backward starts from, inputs and outputs apart."""
        return {name for kernel in self.kernels for name in kernel.saves} - self.outside
