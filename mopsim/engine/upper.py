"""What may come on top of the tensors that the ledger counts, at most, cause by cause.

The routing is the one that `training.routing` states; another is another simulation (`search --any-routing`
asks for the worst).
"""

from collections.abc import Iterable, Mapping

from msgspec.structs import replace

from mopsim.program.workload import CommGroup, Work
from mopsim.spec.hardware import COLLECTIVES
from mopsim.spec.sharding import Sharding
from mopsim.spec.strategy import Strategy

ALLOCATOR = 0.06
"""Blocks of torch's caching allocator over live tensors: "a few per cent up to about 6 %" (the README of the
published runs); 0 to 4 % in 15 of 16 messages of training that ran out (reports/allocator)."""
PAIR, COMMUNICATOR = 544 * 2**20, 688 * 2**20
"""Bytes of a communicator of two ranks, and of more: "544 MB" and "688 MB" on four A100 with NVLink
(github.com/NVIDIA/nccl issue 964), whole numbers of the driver's 2 MiB pages only in MiB."""
EXCHANGE, EXCHANGE_PEERS = 3.28e9, 7
"""Bytes that the first all-to-all adds to its communicator, and to how many peers (NCCL on eight H100,
github.com/NVIDIA/nccl issue 1685). Beyond eight ranks the channels are shared among the peers."""
HOLES = 8
"""Bytes that blocks leave idle for each logit of whole logits that a rank puts together from slices: 4 to 9
by torch's caching allocator, played on fifteen layouts (reports/allocator, docs/adr/0083)."""
NETWORK = 512 * 2**20
"""Bytes of the buffer that all sends of a communicator to peers behind a NIC share (NCCL 2.28 on B300,
github.com/NVIDIA/nccl issue 2363; that it is one: issue 1450)."""
PROCESS = 2_056_600 * 1024
"""Bytes of the host for a process with a CUDA context: 438,632 to 2,056,600 of time's "kbytes", which are
KiB (github.com/pytorch/pytorch issue 113326)."""


def device(peak: int, copies: int, wires: int, holes: int = 0) -> dict[str, int]:
    """Bytes above a peak of live tensors, by cause. copies: of tensors that the ledger does not have; wires:
    of `communication`; holes: of `around_logits`. Idle blocks are none: torch frees whole ones of every
    stream and asks again before it runs out (CUDACachingAllocator.cpp, release_cached_blocks); what is used
    in part is the allocator's, and around logits theirs."""
    causes = {
        "copies": copies, "allocator": round(ALLOCATOR * (peak + copies)), "logits": holes,
        "communication": wires,
    }  # fmt: skip
    return {name: size for name, size in causes.items() if size}


def around_logits(gathered: int, peak: int, at_loss: int) -> int:
    """Bytes above the peak of the fullest rank that blocks around whole logits, gathered from slices, take.
    at_loss: peak of the rank that has them, if that is at its loss, else 0."""
    return max(0, HOLES * gathered - (peak - at_loss)) if at_loss else 0


def idle_blocks(
    sharding: Sharding, strategy: Strategy, at_peak: Mapping[str, int], highest: Mapping[str, int]
) -> int:
    """Bytes that are cached at the peak and serve nobody: torch's caching allocator has a pool for each
    stream, and FSDP gathers parameters and reduces gradients on streams of their own, as does DeepSpeed,
    which sends a copy of its buffer."""
    copied = sent_copy(sharding, strategy)
    apart = ("gathered", "grads") if sharding.fsdp else ("gathered",) if copied else ()
    return copied + sum(highest[name] - at_peak.get(name, 0) for name in apart)


def sent_copy(sharding: Sharding, strategy: Strategy) -> int:
    """Bytes of the copy of its buffer that DeepSpeed sends."""
    sent = strategy.dense.zero == 3 or strategy.fills_while_reducing
    return int(sharding.reduce_buffer * sent)


def cached_blocks(blocks: int, before: int, peak: int) -> int:
    """Bytes that flat tensors of the step's end (`blocks`) take on top of the peak. before: what is there
    then, with what the passes needed where the allocator has it cached in smaller blocks."""
    return max(0, before + blocks - peak) if blocks else 0


def communication(works: Iterable[Work], exchange: tuple[CommGroup, int] | None = None) -> int:
    """Bytes of the communication library: each group of ranks has a communicator, with more for an exchange
    of all with all, and for what one rank sends another through the network. Groups of equal size and span
    count as one; what a profile's `reserved` already holds is not subtracted. exchange: a group that
    exchanges by other means, and bytes of their buffers."""
    groups: dict[tuple[int, int], set[str]] = {}
    for work in works:
        apart = exchange is not None and work.kind == "all_to_all" and _alike(work.group, exchange[0])
        if work.kind in COLLECTIVES and work.group.size > 1 and not apart:
            size = 2 if work.kind == "send_recv" else work.group.size
            inside = size if work.group.intra == work.group.size else min(work.group.intra, size - 1)
            groups.setdefault((size, inside), set()).add(work.kind)
    total = float(exchange[1] if exchange else 0)
    for (size, intra), kinds in groups.items():
        total += PAIR if size == 2 else COMMUNICATOR
        if "all_to_all" in kinds:
            total += EXCHANGE * min(1.0, (intra - 1) / EXCHANGE_PEERS)
        if intra < size and kinds & {"all_to_all", "send_recv"}:
            total += NETWORK
    return round(total)


def _alike(one: CommGroup, other: CommGroup) -> bool:
    """Whether they are the same ranks, however many rows these choose."""
    return replace(one, choices=0.0) == replace(other, choices=0.0)


def host(by_category: Mapping[str, int], rounding: Mapping[str, float]) -> dict[str, int]:
    """Bytes above what the tensors on the host of a rank with a device of its own take, by cause. rounding:
    see mopsim.program.pinned."""
    pinned = sum(size * (rounding.get(name, rounding["other"]) - 1.0) for name, size in by_category.items())
    causes = {"pinned blocks": round(pinned), "process": PROCESS}
    return {name: size for name, size in causes.items() if size}
