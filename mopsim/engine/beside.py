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
    each, sparing = list[float](), dict[int, bool]()
    for kind, op in enumerate(program.alike.firsts):
        compute = op.stream == "compute"
        each.append(lost([prices[id(one)] for one in op.work], hardware, stack) if compute else share)
        if op.stream in TALKS and op.work and all(one.spares for one in op.work):
            sparing[kind] = True
    return Beside(share, program.alike.each(each), frozenset(program.alike.some(sparing)))
