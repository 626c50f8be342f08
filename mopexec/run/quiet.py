"""Which steps nothing disturbed: on a CPU other programs take cores from the ranks, and a step shows it."""

import statistics
from collections.abc import Sequence

LOST = 0.1
"""Part of a quiet step's seconds that a step may lose to others before it counts as disturbed."""


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
