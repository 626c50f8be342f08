"""Whether a side's program is the one that a stack describes."""

from collections.abc import Iterator
from dataclasses import replace
from operator import attrgetter
from typing import Any

from mopsim.common.errors import SpecError
from mopsim.spec.capability.expressions import SIDES, holds
from mopsim.spec.capability.job import Job
from mopsim.spec.capability.table import ROWS
from mopsim.spec.has import plain
from mopsim.spec.stacks import load_stack

SHIPPED = {side: one["runs"] for side, one in SIDES.items() if "runs" in one}
"""Stacks that describe what mopexec's runtimes really do."""
_SECTIONS = ("kernels", "sharding", "recompute", "host")
_COUNTED = ("host.modules",)
"""Entries that change what is counted of a program, not the program."""


def software_is_the_runtimes(job: Job, side: str) -> Iterator[SpecError]:
    """Every entry of the stack is what the runtime does, on a device of some kind."""
    shipped = load_stack(SHIPPED[side])
    known = [shipped.on_kind(kind) for kind in ("cuda", "cpu")]
    for section in _SECTIONS:
        theirs = getattr(job.software, section)
        for field in theirs.__struct_fields__:
            says = getattr(theirs, field)
            runs = [getattr(getattr(one, section), field) for one in known]
            if field == "attention":
                runs.extend({key: kernel} for key in says for kernel in SIDES[side]["attention"])
            if says not in runs and f"{section}.{field}" not in _COUNTED:
                rule = " or ".join(repr(one) for one in dict.fromkeys(map(str, runs)))
                yield SpecError(
                    f"stack.{section}.{field}", says, f"is not {SIDES[side]['does']}, only {rule}"
                )


def what_the_stack_has(job: Job, side: str) -> Iterator[SpecError]:
    """Every field that acts has a value that the program can have (`Stack.has`), under all conditions that
    hold."""
    stack = job.software
    entries: dict[str, dict[str, tuple[Any, ...]]] = {}
    for key, values in stack.has.items():
        path, _, where = key.partition(" where ")
        if ROWS[f"strategy.{path}"].acts_in(job) and (not where or holds(where)(job)):
            entries.setdefault(path, {})[where] = tuple(map(plain, values))
    for path, had in entries.items():
        value = attrgetter(path)(job.strategy)
        if all(value in values for values in had.values()):
            continue
        works = [one for one in next(iter(had.values())) if all(one in values for values in had.values())]
        told = [where for where, values in had.items() if where and (value not in values or not works)]
        on = f"the stack {stack.name}{' where ' * bool(told)}{' and '.join(told).replace('_', ' ')}"
        only = f"only {' or '.join(map(repr, works))}" if works else "nor is any other value"
        yield SpecError(f"strategy.{path}", value, f"is not {SIDES[side]['does']} on {on}, {only}")


def what_the_target_has(job: Job, side: str) -> Iterator[SpecError]:
    """As of the job's own stack, of the one that describes a target and has its name."""
    yield from what_the_stack_has(replace(job, stack=load_stack(side)), side)


def no_runtime(job: Job) -> SpecError | None:
    """The error of a stack that no runtime of mopexec runs."""
    if job.software.runtime:
        return None
    rule = f"of the stack {job.software.name}: mopexec runs {', '.join(SHIPPED.values())} only"
    return SpecError("stack.runtime", "", rule)
