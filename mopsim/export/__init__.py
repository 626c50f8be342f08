"""A plan in the language of what people already run. What a target can't express is refused, or listed."""

from mopsim.common.errors import MopError, SpecError
from mopsim.export.forms import text_of
from mopsim.export.target import Target, target
from mopsim.spec.capability import EXPORTS, Job, refusals
from mopsim.spec.plan import Plan

TARGETS: dict[str, Target] = {name: target(name) for name in EXPORTS}


def target_of(to: str) -> Target:
    """The target of a name. Raises MopError for an unknown one."""
    if to not in TARGETS:
        raise MopError(f"to: {to!r} is not one of {', '.join(TARGETS)}")
    return TARGETS[to]


def gaps_of(job: Job) -> dict[str, list[SpecError]]:
    """What each target cannot express of a job, by its name."""
    return {to: list(refusals(job, by=to)) for to in TARGETS}


def export(plan: Plan, to: str, *, lossy: bool = False) -> tuple[str, list[SpecError]]:
    """(text of the configuration, what it leaves out) of `plan` for the target `to`.

    Raises MopError for an unknown target, for a plan that its own stack does not have (what the simulator
    refuses) and, unless `lossy`, for one that the target cannot express: one line that names the first field,
    and how many more there are.
    """
    target_of(to)
    for refused in refusals(plan, by="simulator"):
        raise refused
    gaps = list(refusals(plan, by=to))
    if gaps and not lossy:
        more = f" (and {len(gaps) - 1} more: {', '.join(gap.field for gap in gaps[1:])})" if gaps[1:] else ""
        raise MopError(f"{gaps[0]}{more}; --lossy writes the rest")
    return text_of(to, plan, gaps), gaps
