"""Published runs as they would be predicted had nobody described their programs: by the stack that stands for
any program that shards its state alike. What these are off by is what to expect of an unknown program."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from mopsim.common.io import to_plain
from mopsim.intervals.errors import ErrorCell
from mopsim.validate.case import Case, Measured
from mopsim.validate.facts import families, general_stacks
from mopsim.validate.scored import trusted
from mopsim.validate.simulated import Progress, Simulated, simulate_all
from mopsim.validate.uncertain import cell, reading

MOST = 6
"""Runs alike in all that errors may have in common, of which more tell little."""
Run = tuple[Case, Simulated]


def guesses(cases: Iterable[Case], jobs: int, progress: Progress) -> tuple[list[Run], list[Run]]:
    """Runs of grade A and B by the general stack of their family, where it has no refusal: as runs of their
    own programs, and of that stack. Simulated at the host's own pace only: nothing is calibrated on a guess.
    """
    chosen = _chosen(cases)
    general = [_general(case) for case in chosen]
    results = simulate_all([replace(case, measured=Measured()) for case in general], jobs, progress)
    own, played = (zip(some, results, strict=True) for some in (chosen, general))
    return [run for run in own if not run[1].error], [run for run in played if not run[1].error]


def _chosen(cases: Iterable[Case]) -> list[Case]:
    """Few of many that are alike, of programs that a stack describes."""
    groups: dict[tuple[ErrorCell, bool], list[Case]] = defaultdict(list)
    for case in cases:
        if not trusted(case) or case.stack in general_stacks():
            continue
        if case.measured.step_time or case.measured.peak_memory:
            groups[cell(case, reading=reading(case)), case.measured.peak_memory is None].append(case)
    return [case for some in groups.values() for case in _spread_out(some)]


def _spread_out(some: Sequence[Case]) -> list[Case]:
    count = min(MOST, len(some))
    return [some[i * len(some) // count] for i in range(count)]


def _general(case: Case) -> Case:
    """What a memory reading means is known of the run, whatever its program."""
    strategy = replace(case.strategy, stack=families()[case.family].stack)
    return replace(case, strategy=strategy, stack_changes={"reading": to_plain(case.program().reading)})
