"""Which of the shipped stacks have something of every strategy of a comparison."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from mopsim.api.inputs import AnyStrategy, Inputs, is_family, strategy_of
from mopsim.search.had import had, not_played
from mopsim.spec.capability import Job
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import list_stacks, load_stack
from mopsim.spec.strategy import Strategy


def for_all(
    given: Iterable[AnyStrategy], inputs: Inputs, runnable: bool = False, first: Sequence[str] = ()
) -> list[str]:
    """Names of the stacks: those of `first`, then the others by name. runnable: only what mopexec runs."""
    asked = [str(one) if is_family(one) else strategy_of(one, inputs)[0] for one in given]
    names = sorted(list_stacks(), key=lambda name: (name not in first, name))
    stacks = [stack for stack in map(load_stack, names) if stack.runtime or not runnable]
    return [stack.name for stack in stacks if all(_has(stack, one, inputs) for one in asked)]


def _has(stack: Stack, asked: str | Strategy, inputs: Inputs) -> bool:
    """Whether a stack has something of a family, or a strategy as it is."""
    if isinstance(asked, str):
        return not had(replace(inputs, stack=stack).problem, asked).refused
    machine = inputs.hardware
    job = Job(inputs.model, asked, inputs.training, stack.on_kind(machine.device_kind), machine)
    return not any(not_played(job))
