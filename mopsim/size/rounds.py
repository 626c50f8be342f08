"""The sizings of several machine types, their questions side by side."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, field

from mopsim.size.ask import Answer, Ask, answer
from mopsim.size.finder import Rounds, sizing
from mopsim.size.points import Request, Sizing
from mopsim.spec.hardware import HardwareProfile

Key = tuple[int, int]
"""The place of a machine type and of a question in its round."""
Queue = deque[tuple[Key, Ask]]
Answered = Iterator[tuple[Key, Answer]]
Answers = Callable[[Queue], Answered]


def size_all(
    request: Request,
    machines: Sequence[HardwareProfile],
    answers: Answers | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Sizing]:
    """The sizing of every machine type, in their order. A machine's next round begins when its last one has
    ended, whatever the others do. answers: of the questions in a queue that grows meanwhile, in any order.
    progress(done, known so far, what was asked)."""
    queue: Queue = deque()
    rounds = [_Round(sizing(request, one), place, queue) for place, one in enumerate(machines)]
    for done, ((place, at), found) in enumerate((answers or _here(request))(queue), 1):
        asked = rounds[place].asks[at].hardware.cluster(rounds[place].asks[at].num_nodes)
        rounds[place].note(at, found)
        if progress:
            progress(done, sum(one.asked for one in rounds), asked)
    return [one.sizing for one in rounds if one.sizing is not None]


@dataclass
class _Round:
    """Where the sizing of one machine type is: the questions of its round and those of their answers that
    came; at last its sizing. asked: questions of all rounds so far."""

    rounds: Rounds
    place: int
    queue: Queue
    asks: list[Ask] = field(default_factory=list)
    found: dict[int, Answer] = field(default_factory=dict)
    asked: int = 0
    sizing: Sizing | None = None

    def __post_init__(self) -> None:
        self._ask(next(self.rounds))

    def note(self, at: int, found: Answer) -> None:
        """Keep an answer; after the last of a round ask those of the next."""
        self.found[at] = found
        if len(self.found) == len(self.asks):
            try:
                self._ask(self.rounds.send([self.found[at] for at in range(len(self.asks))]))
            except StopIteration as ended:
                self.sizing = ended.value

    def _ask(self, asks: list[Ask]) -> None:
        self.asks, self.found, self.asked = asks, {}, self.asked + len(asks)
        self.queue.extend(((self.place, at), ask) for at, ask in enumerate(asks))


def _here(request: Request) -> Answers:
    def answers(queue: Queue) -> Answered:
        while queue:
            key, ask = queue.popleft()
            yield key, answer(request, ask)

    return answers


def beside(request: Request, processes: Executor) -> Answers:
    """Questions are answered side by side in `processes`."""

    def answers(queue: Queue) -> Answered:
        asked: dict[Future[Answer], Key] = {}
        while queue or asked:
            while queue:
                key, ask = queue.popleft()
                asked[processes.submit(answer, request, ask)] = key
            for one in wait(asked, return_when=FIRST_COMPLETED).done:
                yield asked.pop(one), one.result()

    return answers


def size(
    request: Request, hardware: HardwareProfile, progress: Callable[[int, int, str], None] | None = None
) -> Sizing:
    """The answer for one machine type, in this process."""
    return size_all(request, [hardware], progress=progress)[0]
