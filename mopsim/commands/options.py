"""What is typed for options of several commands, and the job that they describe."""

import re
from collections.abc import Mapping
from typing import Any

from mopsim.common.errors import MopError, shown
from mopsim.common.units import parse_count

MOST_SIMULATIONS = 10**6


def simulations(text: str) -> int:
    """`--budget` of a search. Raises MopError, which names the other meaning that the option has."""
    typed = str(text)
    if not re.fullmatch("0*[1-9][0-9]{0,6}", typed, re.ASCII) or int(typed) > MOST_SIMULATIONS:
        rule = f"is not a number of simulations, 1 to {MOST_SIMULATIONS:,} (dollars are --budget of size)"
        raise MopError(f"--budget: {shown(typed)} {rule}")
    return int(typed)


def keywords(given: Mapping[str, Any]) -> dict[str, Any]:
    """A job as typed, as keywords of the API. Raises MopError naming the option."""
    job = {name: one for name, one in given.items() if name != "any_plan"}
    return job | {"seq_len": parse_count(job["seq_len"], "--seq-len")}
