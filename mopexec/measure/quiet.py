"""What other programs take: on a CPU they take cores from the ranks, and a step shows it."""

import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from mopsim.spec.plan import LOST

WATCHED = 0.3
"""Seconds for which this process sleeps to see what others take."""
_IDLE = (3, 4)
"""Columns of /proc/stat (proc(5)) in which a core has nothing to do: idle, iowait."""


def others(cores: Sequence[int], seconds: float = WATCHED) -> float:
    """Part of the time of these cores that other programs take now, 0 to 1; 0 where the kernel does not
    tell."""
    before = _ticks(cores)
    time.sleep(seconds)
    return _share(before, _ticks(cores))


class Watch:
    """What other programs take of cores while this process, alone on them, works. Looks at them where it is
    begun and where it is asked, and nowhere between."""

    def __init__(self, cores: Sequence[int]) -> None:
        self._cores = cores
        self.begin()

    def begin(self) -> None:
        """Leave out what was before."""
        self._before, self._used = _ticks(self._cores), time.process_time()

    def share(self) -> float:
        """Part of the time of the cores that others had since `begin`, 0 to 1; 0 where the kernel does not
        tell, or there are no cores."""
        own = (time.process_time() - self._used) * os.sysconf("SC_CLK_TCK")
        return _share(self._before, _ticks(self._cores), own)


def _share(before: Sequence[int], after: Sequence[int], own: float = 0.0) -> float:
    """Part of the ticks between two looks that were busy, less this process's own."""
    passed = [now - once for now, once in zip(after, before, strict=False)]
    if sum(passed) <= 0:
        return 0.0
    return min(1.0, max(0.0, (passed[0] - own) / sum(passed)))


def _ticks(cores: Sequence[int]) -> list[int]:
    """(busy, idle) of some cores since the start of the machine, of /proc/stat; empty where there is none."""
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    rows = {name: [int(one) for one in rest] for name, *rest in map(str.split, lines) if name[:3] == "cpu"}
    found = [rows[f"cpu{core}"][:8] for core in cores if f"cpu{core}" in rows]  # the rest is guests', counted
    idle = sum(row[column] for row in found for column in _IDLE)
    return [sum(map(sum, found)) - idle, idle]


def loaded(share: float, cores: int, measured: str) -> str:
    """The line of a machine whose cores others have more than LOST of, '' where they have less."""
    if share <= LOST:
        return ""
    return (
        f"other programs have {share * cores:.1f} of the {cores} cores (quiet: at most {LOST * cores:.1f}): "
        f"{measured} a busy machine's"
    )


def quiet(seconds: Sequence[float], busy: Sequence[float | None]) -> list[bool]:
    """Whether each step is quiet. seconds: the slowest rank's; busy: CPU seconds of the rank that used most
    (None where nobody measured them: then every step counts as quiet).

    A rank that waits for a peer or for a core uses none: that loss is held against the steps of the fastest
    quarter, so that a step which only has more to do is no disturbed one.
    """
    known = [used for used in busy if used is not None]
    if len(known) < len(seconds) or not seconds:
        return [True] * len(seconds)
    lost = [wall - used for wall, used in zip(seconds, known, strict=True)]
    fastest = sorted(range(len(seconds)), key=seconds.__getitem__)[: max(1, len(seconds) // 4)]
    usual = statistics.median(lost[i] for i in fastest)
    allowed = usual + LOST * statistics.median(seconds[i] for i in fastest)
    return [i in fastest or loss <= allowed for i, loss in enumerate(lost)]
