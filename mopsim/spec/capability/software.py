"""Whether a side's program is the one that a stack describes."""

from collections.abc import Iterator

from mopsim.common.errors import SpecError
from mopsim.spec.capability.facts import DOES, Job, Side, pairs
from mopsim.spec.stacks import load_stack

SHIPPED: dict[str, str] = {
    "flat_units": "mopexec-flat",
    "fully_shard": "mopexec-fsdp2",
    "split_modules": "mopexec-split",
}
"""Stacks that describe what mopexec's runtimes really do."""
_SECTIONS = ("kernels", "sharding", "recompute", "host")
_COUNTED = ("host.modules",)
"""Entries that change what is counted of a program, not the program."""


def software_is_the_runtimes(job: Job, side: Side) -> Iterator[SpecError]:
    """Every entry of the stack is what the runtime does."""
    known = load_stack(SHIPPED[side])
    for section in _SECTIONS:
        ours, theirs = getattr(known, section), getattr(job.software, section)
        for field in ours.__struct_fields__:
            runs, says = getattr(ours, field), getattr(theirs, field)
            if runs != says and f"{section}.{field}" not in _COUNTED:
                yield SpecError(f"stack.{section}.{field}", says, f"is not {DOES[side]}, only {runs!r}")


def no_runtime(job: Job) -> SpecError | None:
    """The error of a stack that no runtime of mopexec runs."""
    if job.software.runtime:
        return None
    rule = f"of the stack {job.software.name}: mopexec runs {', '.join(SHIPPED.values())} only"
    return SpecError("stack.runtime", "", rule)


def updates_beside_gathers(job: Job, side: Side) -> Iterator[SpecError]:
    """A program that lists its operators knows which gather needs which update."""
    how = job.strategy.optimizer.overlap
    if how != "none" and not pairs(job):
        rule = f"is not {DOES[side]} but for explicit programs (stack mopexec-flat) that have its operators"
        yield SpecError("strategy.optimizer.overlap", how, rule)
