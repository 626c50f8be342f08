"""What is kept of a run: busy and exposed seconds, time by component, spans when asked for."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mopsim.program.workload import Op, Program
from mopsim.spec.categories import WAITING


@dataclass(frozen=True, slots=True)
class Span:
    """An op on the timeline, seconds. layer: of the network, -1 for what is of none. kind: of its work."""

    stream: str
    name: str
    component: str
    phase: str
    start: float
    end: float
    microbatch: int = 0
    layer: int = -1
    kind: str = ""

    @property
    def drawn_as(self) -> str:
        """What a picture colours it by: of what is computed the component, of what is moved the kind."""
        return self.component if self.stream == "compute" else self.kind or self.component


def turns(program: Program) -> list[int]:
    """The turn of each op: the latest microbatch whose forward was issued by then; -1 for the optimizer's.

    A turn of a pipeline is a forward and the backward of an earlier microbatch: in its steady state a turn
    repeats the one before, which the passes of one microbatch do not.
    """
    latest, found = 0, []
    for op in program.ops:
        microbatch = op.microbatch
        if microbatch > latest:
            latest = microbatch
        found.append(latest if microbatch >= 0 else -1)
    return found


@dataclass(slots=True)
class Tally:
    """Seconds of one turn (`turns`). ready, start: at which the stream was ready for its first op, and ran
    it."""

    exposed: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    component: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    ready: float = -1.0
    start: float = -1.0


class Record:
    """One rank's run. Seconds of the compute stream are booked on the components of its ops, its waits on
    `WAITING`, and on what ran meanwhile and was waited for, so that no collective or copy is exposed longer
    than it is busy.

    kinds: of an op of several kinds of work (its index), each kind's share of its seconds. starts, ends,
    issued: seconds of every op (issued: 0 without a host thread). moves: ops as they start (their index) and
    end (the index inverted), in their order. turns: of every op.
    behind: seconds by which the host falls behind in layers that are not played, by the op in their place.
    """

    def __init__(self, keep_spans: bool, kinds: Mapping[int, Mapping[str, float]] | None = None) -> None:
        self.kinds = kinds or {}
        self.starts: Sequence[float] = ()
        self.ends: Sequence[float] = ()
        self.issued: list[float] = []
        self.moves: list[int] = []
        self.turns: list[int] = []
        self.behind: dict[int, float] = {}
        self.tallies: dict[int, Tally] = defaultdict(Tally)
        self.spans: list[Span] | None = [] if keep_spans else None
        self.end = 0.0

    def turn(self, first: int) -> Tally:
        """The tally of a turn, or of the next in which the rank computes; the end's where none follows. Ranks
        without layers compute in no turn, those of few in some."""
        computed = (index for index in self.tallies if index >= first and self.tallies[index].start >= 0.0)
        index = min(computed, default=-1)
        return self.tallies[index] if index >= 0 else Tally(ready=self.end, start=self.end)

    def began(self, turn: int, ready: float, start: float) -> dict[str, float]:
        """The compute stream has run an op of a turn, its first unless it had one before: its seconds by
        component."""
        tally = self.tallies[turn]
        if tally.start < 0.0:
            tally.ready, tally.start = ready, start
        return tally.component

    def waited(self, op: Op, seconds: float) -> None:
        """The compute stream stood still before `op`; `blame` says for what."""
        if seconds > 0.0:
            self._tally(op).component[WAITING] += op.times * seconds

    def blame(self, waiting: Op, op: Op, seconds: float, kind: str = "") -> None:
        """`op` (or what `kind` says) was what the compute stream stood still for before `waiting`."""
        if seconds > 0.0:
            self._expose(waiting, op, waiting.times * seconds, kind)

    def idle(self, op: Op, seconds: float) -> None:
        """The compute stream stood still before `op` because the host had not issued it."""
        if seconds > 0.0:
            self._tally(op).exposed["host"] += op.times * seconds
            self._tally(op).component[WAITING] += op.times * seconds

    def held(self, op: Op, seconds: float, compute: bool) -> None:
        """Kernels inside `op`, whose time `ended` books, ran apart because the host issued them late."""
        if not compute:
            return
        self._tally(op).exposed["host"] += op.times * seconds
        self._tally(op).component[WAITING] += op.times * seconds
        self._tally(op).component[op.component] -= op.times * seconds

    def stolen(self, op: Op, seconds: float) -> None:
        """Compute lost `seconds` to a collective beside it."""
        if seconds > 0.0 and op.work:
            self._expose(op, op, op.times * seconds)

    def _tally(self, op: Op) -> Tally:
        return self.tallies[self.turns[op.index]]

    def _expose(self, waiting: Op, op: Op, seconds: float, kind: str = "") -> None:
        exposed = self._tally(waiting).exposed
        if not kind and op.index in self.kinds:
            for one, share in self.kinds[op.index].items():
                exposed[one] += share * seconds
        else:
            exposed[kind or (op.work[0].kind if op.work else "dependency")] += seconds

    def ended(self, ops: Sequence[Op]) -> None:
        """All ops have run."""
        self.end = max(self.ends, default=0.0)
        if self.spans is None:
            return
        for place in self.moves:
            start, end = self.starts[~place], self.ends[~place]
            if place < 0 and end > start:
                op = ops[~place]
                where = op.stream, op.name, op.component, op.phase
                kind = op.work[0].kind if op.work else ""
                self.spans.append(Span(*where, start, end, op.microbatch, op.layer, kind))
