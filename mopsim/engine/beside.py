"""What the ops of a program lose to collectives that run beside them."""

from dataclasses import dataclass
from functools import cached_property

from mopsim.cost.beside import lost
from mopsim.engine.account import Prices
from mopsim.program.workload import TALKS, Program
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.stack import Stack


@dataclass(frozen=True)
class Beside:
    """share: of its throughput, what a kernel loses beside any collective. lost: what each op does, by its
    index, where one of them spares products no SMs. sparing: collectives that do."""

    share: float
    lost: list[float]
    sparing: frozenset[int]

    @staticmethod
    def even(program: Program, share: float) -> "Beside":
        """All kernels lose alike."""
        return Beside(share, [share] * len(program.ops), frozenset())

    @cached_property
    def most(self) -> float:
        return max(self.share, max(self.lost, default=0.0))


def beside(program: Program, hardware: HardwareProfile, stack: Stack, prices: Prices) -> Beside:
    """prices: of all work of the program."""
    share = hardware.communication_share
    if hardware.product_share <= share:
        return Beside.even(program, share)
    found: dict[int, float] = {}
    each, sparing = list[float](), list[int]()
    for op in program.ops:
        work = op.work
        if op.stream == "compute":
            if id(work) not in found:
                found[id(work)] = lost([prices[id(one)] for one in work], hardware, stack)
            each.append(found[id(work)])
            continue
        each.append(share)
        if op.stream in TALKS and work and all(one.spares for one in work):
            sparing.append(op.index)
    return Beside(share, each, frozenset(sparing))
