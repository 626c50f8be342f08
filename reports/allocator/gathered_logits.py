"""What torch's caching allocator needs beside live tensors where a rank gathers whole logits from slices.

    python reports/allocator/gathered_logits.py    (two minutes; writes gathered_logits.json beside it)

The last stage of a pipeline of Aleph Alpha's Scaling (737f855), of networks of arXiv 2311.05610, is played
tensor by tensor in the order of its source: layers with flash attention, the head, torch's cross entropy on a
copy in fp32, their backward. See README.md.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

GIB, MIB = 2**30, 2**20
VOCABULARY, HEAD = 128_000, 128
MICROBATCHES = 6


class OutOfMemoryError(Exception):
    """No room, after all that is free has been given back."""


@dataclass(eq=False, slots=True)
class Block:
    """A part of a segment, between two others."""

    size: int
    free: bool = True
    before: "Block | None" = None
    after: "Block | None" = None


@dataclass(slots=True)
class Allocator:
    """The large pool of c10/cuda/CUDACachingAllocator.cpp: best fit, blocks split where more than 1 MiB
    stays, merged with their neighbours. Where the device has no more, pending frees are waited for, whole
    segments given back, and it is asked again. waits: whether what NCCL has used is free only once it is
    waited for (recordStream, whose event is behind the host)."""

    limit: int
    waits: bool = True
    idle: list[Block] = field(default_factory=list)
    pending: list[Block] = field(default_factory=list)
    reserved: int = 0
    live: int = 0
    peak: int = 0

    def take(self, size: int) -> Block:
        size = max(512, -(-size // 512) * 512)
        found = self._fitting(size) or self._segment(size)
        if found is None:
            self.synchronize()
            self._give_back()
            found = self._fitting(size) or self._segment(size)
        if found is None:
            raise OutOfMemoryError
        if found.size - size > MIB:
            rest = Block(found.size - size, before=found, after=found.after)
            if found.after:
                found.after.before = rest
            found.after, found.size = rest, size
            self.idle.append(rest)
        found.free = False
        self.live += found.size
        self.peak = max(self.peak, self.live)
        return found

    def drop(self, *blocks: Block, used: bool = False) -> None:
        """used: by NCCL."""
        for block in blocks:
            self.live -= block.size
            if used and self.waits:
                self.pending.append(block)
            else:
                self._free(block)

    def brief(self, size: int) -> None:
        """A tensor that comes and goes."""
        self.drop(self.take(size))

    def synchronize(self) -> None:
        """The host waits for the device."""
        done, self.pending = self.pending, []
        for block in done:
            self._free(block)

    def _fitting(self, size: int) -> Block | None:
        found = min((one for one in self.idle if one.size >= size), key=lambda one: one.size, default=None)
        if found:
            self.idle.remove(found)
        return found

    def _segment(self, size: int) -> Block | None:
        whole = 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        if self.reserved + whole > self.limit:
            return None
        self.reserved += whole
        return Block(whole)

    def _give_back(self) -> None:
        whole = [one for one in self.idle if not one.before and not one.after]
        self.idle = [one for one in self.idle if one.before or one.after]
        self.reserved -= sum(one.size for one in whole)

    def _free(self, block: Block) -> None:
        block.free = True
        if (after := block.after) and after.free:
            self.idle.remove(after)
            block.size, block.after = block.size + after.size, after.after
            if block.after:
                block.after.before = block
        if (before := block.before) and before.free:
            self.idle.remove(before)
            before.size, before.after = before.size + block.size, block.after
            if before.after:
                before.after.before = before
            block = before
        self.idle.append(block)


@dataclass(frozen=True, slots=True)
class Job:
    """hidden, wide: of a layer; layers: of the stage. predicted: GiB of live tensors by the simulator."""

    name: str
    ran: bool
    predicted: float
    hidden: int
    wide: int
    layers: int
    tensor: int
    sequences: int
    length: int
    sequence_parallel: bool = False
    recomputed: bool = True
    fused_norm: bool = False


class Stage:
    """Plays microbatches of a job, sizes in bytes. rows: of a rank's part of the sequence, times the hidden
    size; own: of all rows, times its heads; up: times its part of the FFN."""

    def __init__(self, job: Job, memory: Allocator) -> None:
        self.job, self.memory = job, memory
        self.tokens = job.sequences * job.length
        self.shards = job.sequence_parallel
        self.whole = 2 * self.tokens * job.hidden
        self.rows = self.whole // job.tensor if self.shards else self.whole
        self.own, self.up = self.whole // job.tensor, 2 * self.tokens * job.wide // job.tensor
        self.reduces = job.tensor > 1

    def _norm(self, kept: list[Block]) -> None:
        """A norm, and the rows that its tensor-parallel region gathers and keeps."""
        m = self.memory
        if not self.job.fused_norm:
            m.brief(self.rows)
            kept.append(m.take(self.rows))
        out = m.take(self.rows)
        if self.shards:
            kept.append(m.take(self.whole))
            m.drop(out, used=True)
        else:
            kept.append(out)

    def _joined(self) -> Block:
        """The output of a row-parallel product, summed, and added to the residual."""
        m = self.memory
        out = m.take(self.whole)
        if self.shards:
            part = m.take(self.rows)
            m.drop(out, used=True)
            out = part
        total = m.take(self.rows)
        m.drop(out, used=self.reduces)
        return total

    def forward(self) -> tuple[Block, list[Block]]:
        """A layer: its output and what its backward needs."""
        m, kept = self.memory, list[Block]()
        self._norm(kept)
        kept.append(m.take(3 * self.own))
        kept.append(m.take(4 * 2 * self.tokens * HEAD))  # cosines and sines by position
        for _ in range(2):
            kept.append(m.take(self.own))
            m.brief(self.own)
        m.synchronize()  # the longest sequence, read by the host
        kept.append(m.take(self.own))
        kept.append(m.take(2 * self.own // HEAD))
        if self.job.sequences > 1:
            between = m.take(self.own)
            kept.append(m.take(self.own))
            m.drop(between)
        kept.append(self._joined())
        self._norm(kept)
        kept += [m.take(self.up) for _ in range(4)]
        return self._joined(), kept

    def _scattered(self, *gradients: Block) -> list[Block]:
        """Gradients of gathered rows, as a rank's part of them."""
        if not self.shards:
            return list(gradients)
        found = []
        for one in gradients:
            found.append(self.memory.take(self.rows))
            self.memory.drop(one, used=True)
        return found

    def _back_through_norm(self, kept: list[Block], *gradients: Block) -> Block:
        m = self.memory
        m.drop(kept.pop())
        made = m.take(self.rows)
        m.drop(*gradients, used=self.reduces)
        if not self.job.fused_norm:
            m.drop(kept.pop())
        return made

    def backward(self, gradient: Block, kept: list[Block]) -> Block:
        """Of a layer; returns the gradient of its input."""
        m, up = self.memory, self.up
        weight = 2 * self.job.hidden * self.job.wide // self.job.tensor
        arrived = m.take(self.whole) if self.shards else None
        back = m.take(up)
        m.brief(weight)
        if arrived:
            m.drop(arrived, used=True)
        m.drop(kept.pop())
        silu, gate = m.take(up), m.take(up)
        m.drop(back, kept.pop(), kept.pop())
        product = m.take(up)
        m.drop(silu, kept.pop())
        m.brief(weight)
        first = m.take(self.whole)
        m.drop(gate)
        m.brief(weight)
        second = m.take(self.whole)
        m.drop(product)
        parts = self._scattered(first, second)
        total = m.take(self.rows)
        m.drop(*parts, used=self.reduces)
        normed = self._back_through_norm(kept, total)
        middle = m.take(self.rows)
        m.drop(normed, gradient, kept.pop())
        return self._attention_back(middle, kept)

    def _attention_back(self, middle: Block, kept: list[Block]) -> Block:
        m, own = self.memory, self.own
        weight = 2 * self.job.hidden**2 // self.job.tensor
        arrived = m.take(self.whole) if self.shards else None
        out = m.take(own)
        m.brief(weight)
        if arrived:
            m.drop(arrived, used=True)
        if self.job.sequences > 1:
            m.drop(kept.pop())
            for _ in range(2):
                laid = m.take(own)
                m.drop(out)
                out = laid
        sums = m.take(2 * own)
        three = [m.take(own) for _ in range(3)]
        m.drop(sums, out, *(kept.pop() for _ in range(4)))
        halves = [m.take(own) for _ in range(2)]
        m.drop(*halves)
        joint = m.take(3 * own)
        m.drop(*three, kept.pop(), kept.pop())
        m.brief(3 * weight)
        found = m.take(self.whole)
        m.drop(joint)
        normed = self._back_through_norm(kept, *self._scattered(found))
        total = m.take(self.rows)
        m.drop(normed, middle)
        return total

    def _logits(self) -> Block:
        """Whole: gathered into a list of slices through a flat buffer of torch's own
        (ProcessGroupNCCL::allgather), and put together."""
        m, job = self.memory, self.job
        size = 2 * self.tokens * VOCABULARY
        if job.tensor == 1:
            return m.take(size)
        mine = m.take(size // job.tensor)
        slices = [m.take(size // job.tensor) for _ in range(job.tensor)]
        m.drop(slices.pop())  # its own place in the list is what it sends
        m.drop(m.take(size), used=True)
        whole = m.take(size)
        m.drop(*slices, mine, used=True)
        return whole

    def _loss(self) -> Block:
        """Cross entropy and its backward, once the logits are there: their gradient, or the slice's."""
        m, job = self.memory, self.job
        wide = 4 * self.tokens * VOCABULARY
        cast = m.take(wide)
        exact = m.take(wide)
        m.drop(cast)
        picked = m.take(wide)
        back = m.take(wide)
        m.drop(picked, exact)
        gradient = m.take(wide // 2)
        m.drop(back)
        if job.tensor > 1:
            mine = m.take(wide // 2 // job.tensor)
            m.drop(gradient)
            gradient = mine
        return gradient

    def play(self) -> None:
        """Each microbatch forward and backward; logits stay until those after the next are there."""
        m, job = self.memory, self.job
        held: dict[int, Block] = {}
        for number in range(MICROBATCHES):
            inputs, kept = [m.take(self.rows)], []
            for _ in range(job.layers):
                out, saved = self.forward()
                if job.recomputed:
                    m.drop(*saved)
                inputs.append(out)
                kept.append(saved)
            normed = m.take(self.rows)
            gathered = m.take(self.whole) if self.shards else None
            logits = self._logits()
            if number % 2 in held:
                m.drop(held[number % 2])
            held[number % 2] = logits
            gradient = self._loss()
            m.brief(2 * job.hidden * VOCABULARY // job.tensor)
            found = m.take(self.whole)
            m.drop(gradient, *([gathered] if gathered else []))
            parts = self._scattered(found)
            gradient = m.take(self.rows)
            m.drop(*parts, used=self.reduces)
            m.drop(normed, inputs.pop())
            for saved in reversed(kept):
                if job.recomputed:
                    out, saved = self.forward()
                    m.drop(out)
                gradient = self.backward(gradient, saved)
                m.drop(inputs.pop())
            m.drop(gradient)


def beside(job: Job, waits: bool) -> float:
    """GiB that the least limit under which all microbatches run is above the live tensors' peak."""
    free = Allocator(2**60, waits)
    Stage(job, free).play()
    low, high = free.peak, 2 * free.peak
    while high - low > GIB // 16:
        middle = (low + high) // 2
        try:
            Stage(job, Allocator(middle, waits)).play()
            high = middle
        except OutOfMemoryError:
            low = middle
    return (high - free.peak) / GIB


SMALL, LARGE = {"hidden": 5120, "wide": 13824}, {"hidden": 6656, "wide": 17920}
LONG = {"sequences": 2, "length": 8192}
KEPT = {"recomputed": False, "fused_norm": True}
JOBS = (
    Job("d9f8e", True, 61.1, **SMALL, layers=20, tensor=1, **LONG),
    Job("a3388", True, 72.5, **SMALL, layers=40, tensor=1, sequences=1, length=8192),
    Job("fcf5d", False, 65.6, **SMALL, layers=40, tensor=2, **LONG),
    Job("44e92", True, 66.8, **SMALL, layers=40, tensor=2, sequences=8, length=2048),
    Job("e035b", True, 52.5, **SMALL, layers=40, tensor=4, **LONG),
    Job("0f483", False, 73.6, **SMALL, layers=10, tensor=2, sequences=4, length=8192),
    Job("1f734", False, 70.7, **SMALL, layers=10, tensor=4, sequences=4, length=8192),
    Job("8a88f", False, 68.2, **LARGE, layers=3, tensor=4, sequences=4, length=8192),
    Job("37d43", False, 69.5, **LARGE, layers=3, tensor=2, sequences=4, length=8192),
    Job("a2b8a", False, 71.5, **LARGE, layers=30, tensor=2, **LONG),
    Job("f84c7", True, 56.3, **LARGE, layers=30, tensor=4, **LONG),
    Job("db678", False, 55.8, **SMALL, layers=20, tensor=8, **LONG, **KEPT),
    Job("c2314", True, 50.5, **SMALL, layers=20, tensor=8, **LONG, **KEPT, sequence_parallel=True),
    Job("1e010", False, 61.0, **SMALL, layers=20, tensor=4, **LONG, **KEPT, sequence_parallel=True),
    Job("ebd74", False, 64.9, **SMALL, layers=20, tensor=4, **LONG, **KEPT),
    Job("2af45", False, 69.0, **SMALL, layers=40, tensor=8, **LONG, **KEPT, sequence_parallel=True),
    Job("394c3", False, 71.8, **LARGE, layers=30, tensor=4, sequences=1, length=8192, **KEPT),
)


def main() -> None:
    """Play all jobs and write what was found."""
    found = []
    for job in JOBS:
        logits = job.sequences * job.length * VOCABULARY
        row = {"run": job.name, "ran": job.ran, "tensor": job.tensor, "predicted_gib": job.predicted}
        for name, waits in (("beside_gib", True), ("beside_gib_if_freed_at_once", False)):
            row[name] = round(beside(job, waits), 1)
        row["bytes_a_logit"] = round(row["beside_gib"] * GIB / logits, 1)
        found.append(row)
        print(row, flush=True)
    text = json.dumps(found, indent=1)
    Path(__file__).with_suffix(".json").write_text(text + "\n")


if __name__ == "__main__":
    main()
