"""The sizings of several machine types, their questions side by side."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, field

from mopsim.size.across import across
from mopsim.size.ask import Answer, Ask, answer
from mopsim.size.finder import Rounds, by_itself, sizing, with_plans
from mopsim.size.known import KnownSteps
from mopsim.size.points import DEFAULT_SIMULATIONS, Request, Sizing
from mopsim.size.rivals import SEARCHES, rivals
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
    """The sizing of every machine type, in their order: each by itself, then with the plans of all, then
    longer where the recommendation between them hangs on it; and so again with twice as many simulations, up
    to those asked for. So what fewer simulations find more of them find too. answers: of the questions in a
    queue that grows meanwhile, in any order. progress(done, known so far, what was asked)."""
    progress = progress or (lambda done, known, asked: None)
    everywhere = [KnownSteps(request, one) for one in machines]
    asked = _Asked(answers or _here(request), progress)
    for simulations in doublings(request.simulations):
        for one in everywhere:
            one.again(simulations)
        asked.side_by_side([by_itself(one) for one in everywhere])
        _compare(asked, everywhere)
        left = SEARCHES
        while longer := rivals(everywhere, left):
            asked.side_by_side([rounds for _, rounds in longer])
            _compare(asked, everywhere)
            left -= len(longer)
    return [sizing(one) for one in everywhere]


def doublings(simulations: int) -> list[int]:
    """Numbers of simulations one after the other: those that come by default, twice as many and so on."""
    found = [min(simulations, DEFAULT_SIMULATIONS)]
    while 2 * found[-1] <= simulations:
        found.append(2 * found[-1])
    return found


def _compare(asked: "_Asked", everywhere: Sequence[KnownSteps]) -> None:
    """Every machine type with the plans of all."""
    while any(asks := [across(one, everywhere) for one in everywhere]):
        asked.side_by_side([with_plans(*one) for one in zip(everywhere, asks, strict=True)])


@dataclass
class _Asked:
    """Questions of machine types. A machine's next round begins when its last one has ended, whatever the
    others do. done, known: questions that were answered, and asked."""

    answers: Answers
    progress: Callable[[int, int, str], None]
    done: int = 0
    known: int = 0

    def side_by_side(self, machines: Sequence[Rounds]) -> None:
        """Until the rounds of all have ended."""
        queue: Queue = deque()
        rounds = [_Round(one, place, queue) for place, one in enumerate(machines)]
        before = self.known
        self.known = before + sum(one.asked for one in rounds)
        for (place, at), found in self.answers(queue):
            ask = rounds[place].asks[at]
            rounds[place].note(at, found)
            self.done, self.known = self.done + 1, before + sum(one.asked for one in rounds)
            self.progress(self.done, self.known, ask.hardware.cluster(ask.num_nodes))


@dataclass
class _Round:
    """Where one machine type is: the questions of its round and those of their answers that came. asked:
    questions of all rounds so far."""

    rounds: Rounds
    place: int
    queue: Queue
    asks: list[Ask] = field(default_factory=list)
    found: dict[int, Answer] = field(default_factory=dict)
    asked: int = 0

    def __post_init__(self) -> None:
        self._go_on(None)

    def note(self, at: int, found: Answer) -> None:
        """Keep an answer; after the last of a round ask those of the next."""
        self.found[at] = found
        if len(self.found) == len(self.asks):
            self._go_on([self.found[at] for at in range(len(self.asks))])

    def _go_on(self, answers: list[Answer] | None) -> None:
        try:
            asks = next(self.rounds) if answers is None else self.rounds.send(answers)
        except StopIteration:
            return
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
