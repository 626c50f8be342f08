"""What of a comparison is of software: which of the shipped stacks have something of every strategy, and what
the attention kernel makes of the lead."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from msgspec import structs

from mopsim.api.inputs import AnyStrategy, Inputs, is_family, strategy_of
from mopsim.common.errors import MopError
from mopsim.common.units import format_seconds
from mopsim.engine import SimResult
from mopsim.report.findings import headline, leaders
from mopsim.search.had import not_played, nothing_of
from mopsim.search.result import TIE
from mopsim.spec.capability import Job
from mopsim.spec.stack import DEFAULT, Stack
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
        return not nothing_of(replace(inputs, stack=stack).problem(), asked)
    machine = inputs.hardware
    job = Job(inputs.model, asked, inputs.training, stack.on_kind(machine.device_kind), machine)
    return not any(not_played(job))


def with_one_attention(inputs: Inputs, results: Mapping[str, SimResult]) -> str:
    """How the next best compares where its attention runs in the winner's kernel and all else in its own
    stack; empty where they have the same, or none differs for it."""
    first, second = leaders(results) or (None, None)
    if first is None or second is None:
        return ""
    ours, theirs = (attention_kernel(results[label], inputs) for label in (first, second))
    other = results[second]
    if ours == theirs:
        return ""
    stack = other.stack.on_kind(inputs.hardware.device_kind)
    stack = structs.replace(stack, kernels=structs.replace(stack.kernels, attention={DEFAULT: ours}))
    try:
        again = replace(inputs, training=other.training).simulate(other.strategy, stack)
    except MopError:
        return ""
    if abs(again.ranked_time / other.ranked_time - 1) <= TIE:
        return ""
    alike = {
        label: again if label == second else results[label] for label in results if label in (first, second)
    }
    return (
        f"with {first}'s attention ({_kernel(ours)} instead of {_kernel(theirs)}) {second} takes "
        f"{format_seconds(again.ranked_time)}, and {headline(alike)}"
    )


def attention_kernel(result: SimResult, inputs: Inputs) -> str:
    """The kernel that attention is priced as."""
    machine = inputs.hardware
    plain = result.training.plain_attention(inputs.model)
    return result.stack.on_kind(machine.device_kind).on(machine.device.architecture, plain).attention


def _kernel(name: str) -> str:
    return "the profile's" if name == "profile" else name
