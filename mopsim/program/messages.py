"""What stages send each other, activations one way and gradients the other; parts of one stage hand theirs
on."""

from collections.abc import Iterable, Mapping

from mopsim.program.builder import Builder
from mopsim.program.context import Context
from mopsim.program.stage import Stage
from mopsim.program.template import Memory, Ops
from mopsim.program.workload import Work
from mopsim.spec.pipeline_order import Slot


class Messages:
    """Of one stage. overlaps: whether sends run beside compute. unsent: what is sent once both passes of a
    turn are issued, where that is so."""

    def __init__(self, context: Context, issue: Builder, stage: Stage) -> None:
        self.c, self.issue, self.stage = context, issue, stage
        self.overlaps = bool(context.strategy.overlap.pipeline)
        self.unsent: list[tuple[str, int, int, Ops]] | None = None
        self._arriving: dict[str, int] = {}
        self._handed: dict[str, Ops] = {}
        self._sent: Memory = ()

    def stays(self, way: str, chunk: int) -> bool:
        """Whether the part that a chunk's output or gradient goes to is of this stage."""
        if not self.c.strategy.pipeline.folded:
            return False
        turn = self.stage.degree - (way == "forward")  # the last part before the V turns, and the one after
        return self.stage.part(chunk) == turn

    def arrive(self, slots: Iterable[Slot]) -> None:
        """Receives of several slots, issued before the host waits for them all."""
        needed = []
        for way, microbatch, chunk in slots:
            begins = self.stage.part(chunk) == (0 if way == "forward" else self.stage.parts - 1)
            if not begins and not self.stays(way, 1 - chunk):
                needed.append((way, microbatch, chunk))
        for place, (way, microbatch, chunk) in enumerate(needed):
            self.issue.microbatch = microbatch
            op = self._posted(way, microbatch, chunk, place == len(needed) - 1)
            self._arriving[f"{way} {microbatch} {chunk}"] = op

    def receive(self, way: str, microbatch: int, chunk: int) -> Ops:
        """An activation or a gradient arrives from a neighbour, or is there."""
        self.freed()
        key = f"{way} {microbatch} {chunk}"
        if key in self._handed:
            return self._handed.pop(key)
        op = self._arriving.pop(key, None)
        return (self._posted(way, microbatch, chunk, not self.overlaps) if op is None else op,)

    def _posted(self, way: str, microbatch: int, chunk: int, awaited: bool) -> int:
        """A receive into a new buffer, made once what ran before is issued. awaited: Megatron-Core waits for
        an exchange that is not overlapped (`batch_p2p_sync`). A message's shape is waited for too."""
        self.issue.hold((("activations", self.c.hidden),))
        op = self.issue.add(
            f"receive {way}", self._stream(way, "in", chunk), "other", way, self._work(), (), (),
            f"{way} {microbatch} {self.stage.part(chunk)}", awaited=awaited,
        )  # fmt: skip
        if not (reads := self.c.stack.host.message_reads):
            return op
        work = (Work("memory_bound", launches=reads),)
        return self.issue.add("shape read", "compute", "other", way, work, (op,), awaited=True)

    def send(self, way: str, microbatch: int, chunk: int, ready: Ops) -> Ops:
        """To a neighbour, and freed: where it overlaps once it is sent, else by what comes next and waits for
        it, which weight gradients do not. Returns what comes next waits for."""
        if self.stays(way, chunk):
            self._handed[f"{way} {microbatch} {1 - chunk}"] = ready
            return ()
        if self.unsent is not None:
            self.unsent.append((way, microbatch, chunk, ready))
            return ()
        self.issue.microbatch = microbatch
        held = self.c.held_output if way == "forward" else 0
        memory = (("activations", held - self.c.hidden),)
        to = self.stage.part(chunk) + (1 if way == "forward" else -1)
        op = self.issue.add(
            f"send {way}", self._stream(way, "out", chunk), "other", way, self._work(), ready,
            memory if self.overlaps else (), f"{way} {microbatch} {to}",
        )  # fmt: skip
        if self.overlaps:
            return ()
        self._sent += memory
        if not self.c.strategy.pipeline.splits:
            self.freed()
        return (op,)

    def freed(self) -> None:
        """What was sent is, once something waits for it."""
        self.issue.hold(self._sent)
        self._sent = ()

    def moved(self, places: Mapping[int, int]) -> None:
        """Ops are at new places (see Builder.weave)."""
        for key, ready in self._handed.items():
            self._handed[key] = tuple(places.get(op, op) for op in ready)

    def _stream(self, way: str, end: str, chunk: int) -> str:
        """Each way's; on a V, where parts of a stage send one way in two directions, one for each part."""
        return f"{way}_{end}" + f" {chunk}" * (self.c.strategy.pipeline.folded and chunk > 0)

    def _work(self) -> tuple[Work, ...]:
        parts = 3 if self.c.stack.host.message_reads else 1  # with the two that say its shape
        return (Work("send_recv", bytes=float(self.c.hidden), launches=parts, group=self.c.groups["stage"]),)
