"""One hardware queue, in which kernels of several streams start in the order of issue."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mopsim.engine.account import Prices
from mopsim.engine.clock import Clock, Wake
from mopsim.program.workload import Op, Program, Work, queued


@dataclass(frozen=True)
class Order:
    """ahead: what starts before each op that is in the queue, -1: nothing. lasts: of ops of several kernels
    that one of another stream comes after, seconds of the last kernel: with its start the queue is free."""

    ahead: dict[int, int] = field(default_factory=dict)
    lasts: dict[int, float] = field(default_factory=dict)


def order(program: Program, durations: Sequence[float], prices: Prices) -> Order:
    """Of a program in one queue. durations: seconds of each op; prices: of all work of the program."""
    ahead, lasts, ops = queued(program), dict[int, float](), program.ops
    for index, first in ahead.items():
        if first < 0 or ops[first].stream == ops[index].stream or _in_blocks(ops[first], ops[index]):
            continue
        last = last_kernel(ops[first].work, prices)
        if last < durations[first]:
            lasts[first] = last
    return Order(ahead, lasts)


def _in_blocks(one: Op, other: Op) -> bool:
    """Whether a product and a collective, which begin together, are issued block by block in turn
    (Overlap.tensor, a ring's steps): each has begun with its first block."""
    return bool(one.deps) and all(getattr(one, name) == getattr(other, name) for name in _CALL)


_CALL = ("deps", "layer", "microbatch", "component", "phase")


def last_kernel(work: Sequence[Work], prices: Prices) -> float:
    """Seconds of the last of an op's kernels, which run one after the other; those of one piece of work take
    the same time."""
    found = 0.0
    for one in reversed(work):
        found += prices[id(one)][1] / max(one.launched, 1.0)
        if one.launched >= 1.0:
            break
    return found


class Queue:
    """The queue in play."""

    def __init__(self, clock: Clock, order: Order) -> None:
        self.clock, self.ahead, self.lasts = clock, order.ahead, order.lasts
        self.begun, self.next = set[int]([-1]), dict[int, Wake]()
        """Ops whose last kernel began, or only waits for its peers; who waits for one of them."""

    def waits(self, index: int, wake: Wake) -> bool:
        """Whether op `index` has to wait for those ahead; `wake` then is."""
        first = self.ahead[index]
        if first in self.begun:
            return False
        self.next[first] = wake
        return True

    def begin(self, index: int) -> None:
        """The last kernel of op `index` begins."""
        self.begun.add(index)
        if index in self.next:
            self.clock.wake(self.next.pop(index))
