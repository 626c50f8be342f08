"""The share of the wall clock that trains: failures, checkpoints, restarts, stragglers, spare nodes.

Pure arithmetic, SI units. J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart
dumps", Future Generation Computer Systems 22 (2006); J. W. Young, CACM 17 (1974).
"""

import math
from dataclasses import dataclass

from scipy.special import pdtr

from mopsim.cost.stack import slowest, speed_spread
from mopsim.size.assumptions import Assumptions
from mopsim.spec.hardware import HardwareProfile

HOUR = 3600.0
LONGEST = 86400.0
"""Seconds between checkpoints at most: people evaluate and restart by hand too."""


@dataclass(frozen=True)
class Goodput:
    """share: of the wall clock that trains at the simulated speed. lost: the rest of it by cause. mtbf:
    seconds between interruptions of the job. interval: seconds of training between checkpoints; blocked: that
    training waits for one; write: until it is on storage; asynchronous: whether it is written beside
    training, from a copy on the host; restart: from a failure until training goes on, the checkpoint read.
    deviation: of the wall clock of one training second, standard, per root second: what chance adds (times
    the root of the seconds). spares: nodes that stand by; ready: probability that they replace all that are
    broken at one time, which the job waits for otherwise."""

    share: float
    lost: dict[str, float]
    mtbf: float
    checkpoint_bytes: float
    interval: float
    blocked: float
    write: float
    asynchronous: bool
    restart: float
    deviation: float
    spares: int
    ready: float


def checkpoint_interval(blocked: float, mtbf: float) -> float:
    """Seconds of training between checkpoints that lose least (Daly 2006, equation 37; to first order Young's
    sqrt(2 x blocked x mtbf))."""
    if blocked >= 2 * mtbf:
        return mtbf
    part = math.sqrt(blocked / (2 * mtbf))
    return math.sqrt(2 * blocked * mtbf) * (1 + part / 3 + part * part / 9) - blocked


def wall_clock(interval: float, blocked: float, restart: float, mtbf: float) -> float:
    """Expected wall clock of a second of training (Daly 2006, equation 20); failures are Poisson."""
    if math.isinf(mtbf):
        return (interval + blocked) / interval
    grown = min((interval + blocked) / mtbf, 500.0)
    return mtbf * math.exp(min(restart / mtbf, 100.0)) * math.expm1(grown) / interval


def rack_nodes(hardware: HardwareProfile) -> int:
    """Nodes that are sold together: a scale-up domain of several nodes is one rack."""
    return max(1, hardware.scale_up_size // hardware.devices_per_node)


def whole_racks(hardware: HardwareProfile, nodes: int) -> int:
    """Nodes that are sold where `nodes` are wanted."""
    unit = rack_nodes(hardware)
    return -(-nodes // unit) * unit


def spare_nodes(nodes: int, hardware: HardwareProfile, a: Assumptions) -> tuple[int, float]:
    """(nodes that stand by, probability that no repair is waited for): so many that a useful second costs
    least, nodes that are sold over the probability. Broken nodes are Poisson with mean nodes x failures x
    repair time."""
    mean = nodes * hardware.devices_per_node * a.failure_rate / HOUR * a.hardware_share * a.repair_time
    most = min(nodes, int(mean + 6 * math.sqrt(mean)) + 2)
    chances = [float(pdtr(spares, mean)) for spares in range(most + 1)]
    sold = [whole_racks(hardware, nodes + spares) for spares in range(most + 1)]
    least = min(range(most + 1), key=lambda spares: sold[spares] / max(chances[spares], 1e-9))
    return least, chances[least]


def goodput(
    hardware: HardwareProfile, nodes: int, checkpoint: float, a: Assumptions, host_room: float = math.inf
) -> Goodput:
    """Goodput of `nodes` whose checkpoints have `checkpoint` bytes in all. host_room: bytes that the plan
    leaves of a rank's host.

    A checkpoint is written by all devices at once at `checkpoint_bandwidth` each. Asynchronous: training
    waits for the copy to the host, the next one waits until the last is written, and what is read after a
    failure is older by the write. Synchronous, and where the host has no room for the copy, which is kept
    from one checkpoint to the next (mopexec/run/saver.py): it waits for the write. Either way it waits for
    `checkpoint_stall` at least, on however many devices: ranks agree on what each of them writes. The
    simulated step waits for the slowest device already: only a spread of speeds that is not the profile's
    costs, or gains. `Assumptions.utilisation` replaces the share, not the rest.
    """
    devices = nodes * hardware.devices_per_node
    mtbf = HOUR / (devices * a.failure_rate) if a.failure_rate else math.inf
    write = checkpoint / (devices * a.checkpoint_bandwidth)
    copy = checkpoint / devices * hardware.host.link_sharing / hardware.host.link_d2h.si
    beside = a.checkpoint_asynchronous >= 0.5 and checkpoint / devices <= host_room
    moved, old = (copy, write) if beside else (max(copy, write), 0.0)
    blocked = max(moved, a.checkpoint_stall)
    restart = a.restart_time + write + old
    best = LONGEST if math.isinf(mtbf) else checkpoint_interval(blocked, mtbf)
    interval = min(max(best, old, 1.0), LONGEST)
    wall = wall_clock(interval, blocked, restart, mtbf)
    slow = slowest(devices, a.straggler_spread) / slowest(devices, speed_spread(hardware))
    spares, ready = spare_nodes(nodes, hardware, a)
    share = max(ready / max(wall * slow, 1.0), 1e-6) if a.utilisation is None else a.utilisation
    cycle = interval + blocked
    square = cycle * cycle / 3 + cycle * restart + restart * restart
    return Goodput(
        share=share,
        lost=_lost(share, wall, slow, ready, (blocked / interval, restart / mtbf)),
        mtbf=mtbf,
        checkpoint_bytes=checkpoint,
        interval=interval,
        blocked=blocked,
        write=write,
        asynchronous=beside,
        restart=restart,
        deviation=math.sqrt(square / mtbf),
        spares=spares,
        ready=ready,
    )


def _lost(
    share: float, wall: float, slow: float, ready: float, causes: tuple[float, float]
) -> dict[str, float]:
    """Shares of the wall clock: waiting for repairs, then for stragglers, the others as they make up Daly's
    wall clock. causes: of a second of training, the checkpoints' and the restarts'."""
    checkpoints, restarts = causes
    repairs = min(1 - ready, 1 - share)
    waits = min(ready * max(0.0, 1 - 1 / slow), 1 - share - repairs)
    rest, extra = 1 - share - repairs - waits, wall - 1
    parts = {"checkpoints": checkpoints, "restarts": min(restarts, max(0.0, extra - checkpoints))}
    parts["work done again"] = max(0.0, extra - sum(parts.values()))
    whole = sum(parts.values())
    scaled = {name: rest * part / whole if whole else 0.0 for name, part in parts.items()}
    return {"repairs": repairs, "stragglers": waits, **scaled}
