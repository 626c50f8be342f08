"""Machine types that a longer search may bring before the recommended one, and how long they are searched.

A search ends with a bound: what was left out is at most so much faster. Where another machine type's cluster
is dearer by less than that, the two are told apart by what their searches happened to find.
"""

from collections.abc import Sequence

from mopsim.size.decided import Decided
from mopsim.size.finder import Rounds, looked_into, sizing
from mopsim.size.known import KnownSteps

LONGER, SEARCHES = 4, 2
"""Times as many simulations as at other counts with which a rival is searched, and such searches of a sizing
at most. Most of a search's time goes into its bounds: one that is long costs less than several."""


def rivals(everywhere: Sequence[KnownSteps], left: int) -> list[tuple[KnownSteps, Rounds]]:
    """The next longer searches, of `left` machine types at most, the nearest first: each at its nearest count
    that may be the better one and was not searched as long. All counts with plans are held against the
    recommended one, those too that miss a limit by no more than they may be faster."""
    request = everywhere[0].request
    found: dict[str, tuple[KnownSteps, Rounds]] = {}
    by_name = {known.hardware.name: known for known in everywhere}
    for one in Decided(request, [sizing(known) for known in everywhere]).rivals():
        name, count = one.point.hardware.name, one.point.num_nodes
        known = by_name[name]
        if name not in found and known.longest[count] < LONGER * request.simulations:
            found[name] = known, looked_into(known, count, LONGER)
    return list(found.values())[:left]
