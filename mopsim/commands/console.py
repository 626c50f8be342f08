"""Where a command prints."""

import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mopsim.api.results import Simulation
from mopsim.common.outputs import STDOUT, plain_console
from mopsim.common.units import format_probability
from mopsim.spec.capability import SIDES


def human(json: str | None) -> Any:
    """A rich console: standard output, or standard error where standard output carries the JSON."""
    return plain_console(stderr=json == "-")


def say_notes(console: Any, notes: Sequence[str]) -> None:
    """What a user must know, a line each."""
    for note in notes:
        console.print(note, style="yellow")


def exported(steps: Sequence[Simulation]) -> str:
    """How many of these `mopsim export` writes for each target; of none, what no target has of the first, or
    else what the nearest lacks."""
    whole = Counter(to for step in steps for to, gaps in step.gaps.items() if not gaps)
    if whole:
        said = ", ".join(f"{count} for {to}" for to, count in whole.most_common())
        return f"mopsim export writes {said}"
    lacking = ({gap.field for gap in gaps} for gaps in steps[0].gaps.values())
    if nowhere := sorted(set.intersection(*lacking)):
        return f"mopsim export writes none: no target has {', '.join(nowhere)} as here"
    to, gaps = min(steps[0].gaps.items(), key=lambda one: len(one[1]))
    return f"mopsim export writes none, --to {to} for {gaps[0]}"


def say_written(console: Any, *paths: str | None) -> None:
    """'Written: a.yaml, b.json', of those that were asked for."""
    files = [path for path in paths if path and path != STDOUT]
    if files:
        console.print(f"Written: {', '.join(files)}", soft_wrap=True)


def say_plan(console: Any, path: str, step: Simulation, which: str = "") -> None:
    """Which plan was written, how likely it fits, and what it is for."""
    given = shlex.quote(path)
    # First those that the plan's stack describes.
    targets = sorted(
        (to for to, gaps in step.gaps.items() if not gaps),
        key=lambda to: step.result.stack.name not in SIDES[to]["stacks"],
    )
    if not step.fits:
        ask = "nothing to train"
    elif step.runnable:
        ask = f"mopexec train --plan {given}"
    elif targets:
        ask = f"mopsim export --plan {given} --to {targets[0]}; mopexec does not run it"
    else:
        ask = f"mopexec does not run it; {exported([step])}"
    odds = f"P(fits) {format_probability(step.result.p_fits)}" if step.fits else step.verdict
    said = ", ".join(filter(None, (which, step.result.strategy.name, odds)))
    console.print(f"Written: {path}: {said} ({ask})", soft_wrap=True)
