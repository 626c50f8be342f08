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
_ATTENTION = {"flat_units": ("profile", "flash2", "flash3", "cudnn", "cpu")}
"""Attention kernels that a runtime takes from the stack; the other runtimes run torch's flash op."""
_FLASH = ("profile", "flash2", "cpu")
_COUNTED = ("host.modules",)
"""Entries that change what is counted of a program, not the program."""


def software_is_the_runtimes(job: Job, side: Side) -> Iterator[SpecError]:
    """Every entry of the stack is what the runtime does, on a device of some kind."""
    shipped = load_stack(SHIPPED[side])
    known = [shipped.on_kind(kind) for kind in ("cuda", "cpu")]
    for section in _SECTIONS:
        theirs = getattr(job.software, section)
        for field in theirs.__struct_fields__:
            says = getattr(theirs, field)
            runs = [getattr(getattr(one, section), field) for one in known]
            if field == "attention":
                runs.extend({key: kernel} for key in says for kernel in _ATTENTION.get(side, _FLASH))
            if says not in runs and f"{section}.{field}" not in _COUNTED:
                rule = " or ".join(repr(one) for one in dict.fromkeys(map(str, runs)))
                yield SpecError(f"stack.{section}.{field}", says, f"is not {DOES[side]}, only {rule}")


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
