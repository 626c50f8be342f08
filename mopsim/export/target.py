"""A configuration language, and the header of every file in one. What a language cannot say of a plan is in
`mopsim.spec.capability`: each gap is the SpecError that names the field of the plan, its value, and why."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mopsim.common.errors import SpecError
from mopsim.common.shipped import kept
from mopsim.common.units import format_probability
from mopsim.export.described import elsewhere
from mopsim.spec.capability import SIDES, Side
from mopsim.spec.plan import Plan


@dataclass(frozen=True)
class Target:
    """One configuration language. checked: the release or commit its keys were checked against.

    render: the file's text, given what it cannot say of the plan.
    """

    name: Side
    checked: str
    render: Callable[[Plan, Sequence[SpecError]], str]


def header(target: str, checked: str, plan: Plan, gaps: Sequence[SpecError], side: Side) -> list[str]:
    """The lines that begin every file: what it is, what its keys were checked against, what is missing.
    side: what the capability table calls the target."""
    hardware, prediction = plan.hardware, plan.prediction
    ranks = f"{plan.strategy.world_size} ranks ({hardware.num_nodes} nodes of {hardware.name})"
    lines = [
        f"{target} configuration of the plan {plan.strategy.name} for {plan.model.name} on {ranks}",
        f"Keys checked against {checked}",
    ]
    if prediction:
        need, limit = prediction.peak_memory / 1024**3, hardware.memory_limit / 1024**3
        over = [
            where
            for where, needed, has in (
                ("device", prediction.peak_memory, hardware.memory_limit),
                ("host", prediction.host_memory, hardware.host_limit),
            )
            if needed > has
        ]
        fits = f"does not fit: {' and '.join(over)}" if over else "fits"
        if prediction.p_fits is not None and not over:
            fits += f" with probability {format_probability(prediction.p_fits)}"
            described = prediction.p_fits_as_described
            if described is not None and described != prediction.p_fits:
                fits += f", {format_probability(described)} as its stack is described"
        promised = f"{prediction.step_time:.4g} s a step, {need:.1f} of {limit:.1f} GiB a device ({fits})"
        whole = ", and of the whole plan: what is not expressed changes it" if gaps else ""
        lines.append(f"mopsim predicts {promised}: under the stack {plan.stack.name}{whole}")
        lines += filter(None, [elsewhere(plan, SIDES[side]["stacks"])])
    return lines + [f"NOT EXPRESSED: {gap}" for gap in gaps]


def keys_of(side: Side) -> dict[str, Any]:
    """What a target's configuration is made of (keys.yaml)."""
    return kept("mopsim.export", "keys.yaml")[side]  # type: ignore[no-any-return]


def unsaid(found: dict[str, Any], gaps: Sequence[SpecError], side: Side) -> dict[str, Any]:
    """Sections without the keys ("section.key") or whole sections of fields that are not expressed: no file
    asks for what its first lines say it does not. Degrees whose ranks the others share stay.
    """
    left = keys_of(side)["left"]
    gone = {key for gap in gaps for key in left.get(gap.field, ())}
    return {
        name: {key: value for key, value in section.items() if f"{name}.{key}" not in gone}
        if isinstance(section, dict)
        else section
        for name, section in found.items()
        if name not in gone
    }
