"""A plan in the language of what people already run. What a target can't express is refused, or listed."""

from mopsim.common.errors import MopError
from mopsim.export.deepspeed import DEEPSPEED
from mopsim.export.gaps import Gap, Target
from mopsim.export.megatron_bridge import MEGATRON_BRIDGE
from mopsim.export.torchtitan import TORCHTITAN
from mopsim.spec.plan import Plan

TARGETS: dict[str, Target] = {target.name: target for target in (TORCHTITAN, MEGATRON_BRIDGE, DEEPSPEED)}

__all__ = ["TARGETS", "Gap", "Target", "export"]


def export(plan: Plan, to: str, *, lossy: bool = False) -> tuple[str, list[Gap]]:
    """(text of the configuration, what it leaves out) of `plan` for the target `to`.

    Raises MopError for an unknown target and, unless `lossy`, for a plan that the target cannot express:
    one line that names the first field, and how many more there are.
    """
    if to not in TARGETS:
        raise MopError(f"to: {to!r} is not one of {', '.join(TARGETS)}")
    target = TARGETS[to]
    gaps = list(target.gaps(plan))
    if gaps and not lossy:
        more = f" (and {len(gaps) - 1} more: {', '.join(gap.path for gap in gaps[1:])})" if gaps[1:] else ""
        raise MopError(f"{gaps[0]}{more}; --lossy writes the rest")
    return target.render(plan, gaps), gaps
