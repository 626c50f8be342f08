"""Why candidates were left out, in a user's words: `SearchResult.rejected` counts them under short ones."""

import re

from mopsim.search.result import TIE
from mopsim.spec.categories import SPOKEN

_LEAST = "by a lower bound of the step"
_WORDS: tuple[tuple[str, str], ...] = (
    ("host memory, bound: (.*)", "host memory: too small {0}"),
    ("host memory, bound", "host memory: too small even for a lower bound"),
    ("device memory, bound: (.*)", "device memory: too small even for a lower bound, most of it {0}"),
    ("memory, bound: (.*)", "memory: too small {0}"),
    ("slower, bound: .*", f"slower than the ranked plans, even {_LEAST}"),
    ("no gain, bound: cannot beat (the best.*) by more than a tie",
     f"at most {TIE:.1%} faster than {{0}}, {_LEAST}".replace("%", " %")),
    ("slower, simulated: .*", "simulated: slower than the ranked plans, or as fast and less plain"),
    ("does not fit, simulated: (.*)", "simulated: does not fit, most of it {0}"),
    ("fits, as described, with a (.*)", "simulated: fits, as described, with a {0}"),
)  # fmt: skip
"""Pattern of a reason -> what is printed of it, the first that matches."""


def plain(reason: str) -> str:
    """A reason as it is printed."""
    for pattern, words in _WORDS:
        if found := re.fullmatch(pattern, reason):
            return words.format(*(SPOKEN.get(one, one) for one in found.groups()))
    return reason
