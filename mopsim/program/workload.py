"""Workload: programs of ops, one program per rank class, each op with stream, work, dependencies and
memory."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TypeVar

from msgspec import Struct

from mopsim.graph.tape import Step
from mopsim.spec.categories import CATEGORIES
from mopsim.spec.stack import Stack

FABRICS = ("scale_up", "scale_out")
COMMUNICATORS = (
    "tensor", "sequence", "experts", "expert_tensor", "expert_ranks", "vocabulary", "world", "stage",
    "state", "replicas",
)  # fmt: skip
"""What has a stream of its own on each fabric. `state`: gathers of parameters and scattered sums of
gradients; `replicas`: sums of gradients over copies. The others: groups of what is computed."""
TALKS = {f"{one} {fabric}": fabric for one in COMMUNICATORS for fabric in FABRICS}
"""Streams of collectives, and the fabric that bounds what they send."""
STREAMS = ("compute", *FABRICS, *TALKS, "h2d", "d2h", "update", "host", "read")
"""`read`: a copy to the host of little that it waits for."""
SLOTS = (*CATEGORIES, *(f"host/{category}" for category in CATEGORIES))
"""Ledger slots: a category on the device, or `host/` and a category on the host."""
SLOT = {name: index for index, name in enumerate(SLOTS)}
NUM_DEVICE_SLOTS = len(CATEGORIES)

Found = TypeVar("Found")
Deltas = tuple[tuple[int, int], ...]
"""(slot, bytes) changes."""


class CommGroup(Struct, frozen=True):
    """Ranks of a collective: `size` in all, at most `intra` of them in one scale-up domain.

    choices: of a deduplicated exchange, the ranks (with repeats) that a row is meant for: more than a token
    chooses where the busiest rank gets more than the mean; 0: all travel. experts: of all the ranks of such
    an exchange, 0 where their number is not known. limit: (n_group, topk_group) that a token's choices are
    limited to. consecutive: they are one after the other. chunk: rows of `row` bytes that its kernels
    send each peer of a node at a time over each of `channels`; 0: all of them. block: devices of the smallest
    aligned block (a power of two) of a domain that holds its ranks there, 0 where it is not known.
    """

    size: int
    intra: int
    choices: float = 0.0
    experts: int = 0
    block: int = 0
    limit: tuple[int, int] = (1, 1)
    consecutive: bool = False
    chunk: float = 0.0
    channels: int = 0
    row: int = 0


class Work(Struct, frozen=True):
    """One kernel, transfer or collective. Which fields count depends on `kind` (see mopsim.cost).

    m, n, k, count: matmuls. flops, seq, backward: attention. bytes: memory traffic, message (the full
    buffer), or transfer. params: of an optimizer update. launches: kernels started for it, one after the
    other; 0: products of a group that another Work starts. calls: what the host starts for it where that
    differs (kernels side by side). host: what the host does for it besides starting it, in kernels' worth
    (mopsim.graph.host_costs). group: ranks of a collective. drops: attention draws a dropout mask inside its
    kernel. indexer: scores by which keys are chosen. gradient: of a product that makes a weight gradient,
    bytes of an element that it moves: written, or read and written where it is added to a buffer. indexed:
    rows are read or written by index. sums: elements added by atomic operations in bf16. ordered: elements
    that several rows, sorted, add to one. serial: rows added to one row, one after the other. dots: elements
    of rows that torch.bmm multiplies in fp32 with a few others each. ranked: numbers that torch.topk ranks.
    chunked: elements that torch's _chunk_cat copies. strided: elements that torch's elementwise kernels
    follow by strides, one after the other, and the bytes that these move, among the others. duplex: a
    transfer beside another the other way, with which it shares host DRAM. spares: a collective whose program
    leaves its SMs out of the products beside it. channels: blocks of a collective at most, 0: as many as the
    library takes.
    """

    kind: str
    flops: float = 0.0
    m: float = 0.0
    n: float = 0.0
    k: float = 0.0
    count: float = 1.0
    bytes: float = 0.0
    seq: int = 0
    backward: bool = False
    drops: bool = False
    indexer: bool = False
    gradient: float = 0.0
    params: float = 0.0
    launches: int = 1
    calls: int = 0
    host: float = 0.0
    indexed: bool = False
    serial: float = 0.0
    sums: float = 0.0
    ordered: float = 0.0
    chunked: float = 0.0
    ranked: float = 0.0
    dots: float = 0.0
    strided: float = 0.0
    strided_bytes: float = 0.0
    duplex: bool = False
    spares: bool = False
    channels: int = 0
    dtype: str = ""
    group: CommGroup = CommGroup(1, 1)

    @property
    def issued(self) -> float:
        """Kernels, copies or collectives that the host starts for it, and that a timer would count."""
        if self.calls:
            return float(self.calls)
        if self.kind == "grouped_matmul":
            return float(self.launches)
        return self.count if self.kind == "matmul" else float(max(self.launches, 1))

    @property
    def launched(self) -> float:
        """Kernels that run one after the other for it; 0: it is part of another's."""
        return self.launches * self.count if self.kind == "matmul" else float(self.launches)


def on_host(work: Iterable[Work], replayed: bool) -> tuple[float, float]:
    """(kernels that the host starts for an op, what it does besides in kernels' worth). replayed: as a part
    of a graph, which is started as one."""
    issued = host = 0.0
    for one in work:
        issued += one.issued
        host += one.host
    return (min(1.0, issued), 0.0) if replayed else (issued, host)


@lru_cache(maxsize=65536)
def shared(work: Work) -> Work:
    """Equal work as one object, so that it is priced once."""
    return work


@lru_cache(maxsize=65536)
def memory_work(num_bytes: float, launches: int, indexed: bool = False) -> Work:
    """Memory-bound work; equal work is one object, so that it is priced once."""
    return Work("memory_bound", bytes=num_bytes, launches=launches, indexed=indexed)


@lru_cache(maxsize=65536)
def collective_work(kind: str, num_bytes: float, group: CommGroup) -> Work:
    """A collective over `num_bytes`; equal work is one object."""
    return Work(kind, bytes=num_bytes, group=group)


class Op(Struct, frozen=True):
    """What one stream does between two dependencies.

    deps: indices of ops of the same program that must have ended. peak: ledger changes at the op's own
    height, held while it runs; net: what remains when it ends. rendezvous: key shared with an op of another
    program; both start together. awaited: the host thread that issues the ops waits for its end before it
    issues the next one (a copy of counts to the host, a synchronized receive). times: how often the step does
    this: once for itself, and once for each layer it stands for (mopsim.program.composed).
    """

    index: int
    name: str
    stream: str
    component: str
    phase: str
    layer: int
    work: tuple[Work, ...]
    deps: tuple[int, ...] = ()
    peak: Deltas = ()
    net: Deltas = ()
    rendezvous: str = ""
    microbatch: int = 0
    awaited: bool = False
    times: int = 1


@dataclass(frozen=True, slots=True)
class Repeat:
    """A period of layers that stands for others: ops [before, first) are the period before it, [first,
    gap) the period; `gap` is the op in whose place it would be repeated `times` times."""

    before: int
    first: int
    gap: int
    times: int


@dataclass(frozen=True)
class Alike:
    """Ops of a program by what they do: all of a kind have one `work`, stream and component. firsts: one op
    of each kind; kinds: the place of each op's kind among these."""

    firsts: list[Op]
    kinds: list[int]

    def each(self, found: Sequence[Found]) -> list[Found]:
        """Of each op what was found of its kind."""
        return [found[kind] for kind in self.kinds]

    def some(self, found: Mapping[int, Found]) -> dict[int, Found]:
        """The same, by op, where something was found of its kind."""
        return {place: found[kind] for place, kind in enumerate(self.kinds) if kind in found} if found else {}


@dataclass(frozen=True)
class Program:
    """What one class of ranks does in a step. stage: of the pipeline. graphs: see Strategy. blocks: bytes of
    flat tensors of the step's end, see Sharding.update_copies."""

    ops: tuple[Op, ...]
    stage: int = 0
    resident: tuple[Step, ...] = ()
    graphs: tuple[str, ...] = ()
    repeats: tuple[Repeat, ...] = ()
    blocks: int = 0

    @cached_property
    def alike(self) -> Alike:
        """Equal work is shared, so what it takes is found once."""
        places, firsts, kinds = dict[tuple[int, str, str], int](), list[Op](), list[int]()
        for op in self.ops:
            key = id(op.work), op.stream, op.component
            kind = places.get(key)
            if kind is None:
                kind = places[key] = len(firsts)
                firsts.append(op)
            kinds.append(kind)
        return Alike(firsts, kinds)


@dataclass(frozen=True, slots=True)
class Workload:
    """All programs of a step. microbatches: in the step; expanded: of them lowered.

    unit: microbatches of one repetition; the rest repeats the `unit` before the last lowered one.
    exact: the schedule is mopexec's own, which allocates to the byte what is lowered. pinned: see
    mopsim.program.pinned.rounding. whole: makes the same workload with every layer played, where this
    one has repeats; longer: with more microbatches lowered. stack: the software that the programs are of.
    cast: bytes of logits that were freed once they were cast, a block too small for what is made of the copy.
    gathered: logits that a rank of the last stage puts together from slices. exchange: see
    mopsim.program.dispatcher.buffers.
    """

    programs: tuple[Program, ...]
    microbatches: int
    expanded: int
    model_flops: float
    guarantee: int = 0
    unit: int = 1
    exact: bool = False
    pinned: dict[str, float] = field(default_factory=lambda: {"other": 1.0})
    whole: "Callable[[], Workload] | None" = None
    longer: "Callable[[], Workload] | None" = None
    stack: Stack = field(default_factory=lambda: Stack(name="none"))
    cast: int = 0
    gathered: int = 0
    exchange: tuple[CommGroup, int] | None = None

    @property
    def repeats(self) -> int:
        """How often `unit` microbatches are repeated."""
        return (self.microbatches - self.expanded) // self.unit


def queued(program: Program) -> dict[int, int]:
    """Of ops in one queue (HostCosts.queues): the one issued before each, which starts before it; -1 of the
    first. Collectives that are asked for at once, of several components, are one.

    Copies have engines of their own. A pipeline's sends and receives are left out: a receive is issued here
    where its slot begins, in Megatron-Core before the slot ahead of it (schedules.py).
    """
    found, before, last = dict[int, int](), -1, tuple[object, ...]()
    for op in program.ops:
        if not op.work or (op.stream != "compute" and op.stream not in TALKS):
            continue
        call = (op.name, op.stream, op.layer, op.deps)
        if call != last or op.stream == "compute":
            found[op.index], before, last = before, op.index, call
    return found


def first_compute(program: Program, index: int) -> int:
    """The first op on the compute stream from `index` on."""
    while program.ops[index].stream != "compute":
        index += 1
    return index


@lru_cache(maxsize=65536)
def deltas(memory: tuple[Step, ...]) -> tuple[Deltas, Deltas]:
    """(changes at the highest device height of a memory script, changes at its end)."""
    run: dict[int, int] = {}
    height = top = 0
    best: dict[int, int] = {}
    host: dict[int, int] = {}
    for category, size in memory:
        slot = SLOT[category]
        run[slot] = run.get(slot, 0) + size
        if slot < NUM_DEVICE_SLOTS:
            height += size
            if height > top:
                top, best = height, {s: v for s, v in run.items() if s < NUM_DEVICE_SLOTS}
        elif run[slot] > host.get(slot, 0):
            host[slot] = run[slot]
    peak = {**best, **host}
    return tuple((s, v) for s, v in peak.items() if v), tuple((s, v) for s, v in run.items() if v)
