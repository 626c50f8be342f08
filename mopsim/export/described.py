"""The software that a configuration is for, where the plan's prediction is of another."""

from collections.abc import Sequence

from msgspec.structs import replace

from mopsim.common.errors import MopError
from mopsim.common.units import format_bytes, format_seconds
from mopsim.engine import simulate
from mopsim.spec.capability import job_of, refusals
from mopsim.spec.plan import Plan
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import list_stacks, load_stack


def elsewhere(plan: Plan, stacks: Sequence[str]) -> str:
    """A line where the plan's stack is a shipped one and none of `stacks`, which describe what the target was
    checked against: the one that compiles as the plan's does, and what it predicts; '' otherwise."""
    name = plan.stack.name
    if name in stacks or name not in list_stacks():
        return ""
    known = [load_stack(one) for one in stacks]
    compiled = plan.stack.kernels.compiled or plan.strategy.compile == "block"
    alike = (one for one in known if one.kernels.compiled == compiled)
    there = next(alike, known[0])
    return (
        f"That stack is another version of the program. The one above is described by {there.name} "
        f"({there.version}): {_predicted(plan, there)} (--stack {there.name} plans for it)"
    )


def again(plan: Plan) -> str:
    """What its own stack predicts of a plan as it is."""
    return _predicted(plan, plan.stack)


def _predicted(plan: Plan, stack: Stack) -> str:
    """'3.2 s a step, 45.3 GiB a device', or why nothing is predicted."""
    profile = job_of(plan).hardware
    if profile is None:
        return "its step is not predicted here, since the plan's profile is no shipped one"
    try:
        strategy = stack.resolve(replace(plan.strategy, stack=stack.name))
        for refused in refusals(replace(plan, strategy=strategy, stack=stack), by="simulator"):
            raise refused
        found = simulate(plan.model, profile, plan.hardware.num_nodes, strategy, plan.training, stack)
    except MopError as error:
        return f"it does not do this plan ({error})"
    return f"{format_seconds(found.step_time)} a step, {format_bytes(found.peak_memory)} a device"
