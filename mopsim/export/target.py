"""A configuration language: a YAML file here, whose sections and remarks are expressions of a plan, as those
of the capability table. What a language cannot say of a plan is in that table (`mopsim.spec.capability`):
each gap is the SpecError that names the field of the plan, its value, and why."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Literal

import msgspec

from mopsim.common.errors import SpecError
from mopsim.common.io import Spec, convert
from mopsim.common.shipped import shipped
from mopsim.common.units import format_nodes, format_probability
from mopsim.export.described import again, elsewhere
from mopsim.spec.capability import SIDES, Job, Side
from mopsim.spec.capability.expressions import compiled
from mopsim.spec.plan import Plan

Keys = Mapping[str, Any]


class Remark(Spec, frozen=True, kw_only=True, rename={"when": "if"}):
    """A line for people, with expressions in braces. when: where it is told (`written`: the sections)."""

    say: str
    when: str = "True"


class Target(Spec, frozen=True, kw_only=True):
    """checked: the release or commit its keys were checked against. form: of its files (mopsim.export.forms).
    sections: keys by section; a text is an expression, `if EXPRESSION` holds keys that are there where it is
    true. let: names of expressions. like: keys of sections that are another target's. left: a field of the
    plan -> keys ("section.key") or whole sections that have the target's (or a recipe's) default where the
    field is not expressed. tables: what its form needs beside."""

    title: str
    checked: str
    form: Literal["toml", "module", "yaml", "json"]
    sections: dict[str, Any]
    let: dict[str, str] = msgspec.field(default_factory=dict)
    like: dict[str, dict[str, tuple[str, ...]]] = msgspec.field(default_factory=dict)
    left: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    remarks: tuple[Remark | str, ...] = ()
    tables: dict[str, Any] = msgspec.field(default_factory=dict)

    def sections_of(self, plan: Plan) -> dict[str, Any]:
        """Sections and keys of a plan's configuration."""
        found: dict[str, Any] = {}
        for other, sections in self.like.items():
            theirs = target(other).sections_of(plan)
            for name, keys in sections.items():
                found[name] = {key: theirs[name][key] for key in keys if key in theirs[name]}
        self._put(found, self.sections, Job(plan.model, plan.strategy, plan.training, plan.stack))
        return found

    def _put(self, found: dict[str, Any], said: Keys, job: Job) -> None:
        for key, value in said.items():
            condition = key.removeprefix("if ")
            if condition != key:
                if compiled(condition, self.let)(job):
                    self._put(found, value, job)
            elif isinstance(value, dict):
                self._put(found.setdefault(key, {}), value, job)
            else:
                found[key] = compiled(value, self.let)(job) if isinstance(value, str) else value

    def said(self, plan: Plan, gaps: Sequence[SpecError]) -> dict[str, Any]:
        """The same without the keys of fields that are not expressed: no file asks for what its first lines
        say it does not. Degrees whose ranks the others share stay."""
        gone = {key for gap in gaps for key in self.left.get(gap.field, ())}
        return {
            name: {key: value for key, value in section.items() if f"{name}.{key}" not in gone}
            if isinstance(section, dict)
            else section
            for name, section in self.sections_of(plan).items()
            if name not in gone
        }

    def remarks_of(self, plan: Plan, written: Keys) -> Iterator[str]:
        """What is told of a plan's file beside its header."""
        job, let = Job(plan.model, plan.strategy, plan.training, plan.stack), {**self.let, "written": "value"}
        for one in self.remarks:
            remark = Remark(say=one) if isinstance(one, str) else one
            if compiled(remark.when, let)(job, written):
                yield compiled(remark.say, let, message=True)(job)


@cache
def target(name: Side) -> Target:
    """The target of a side of the capability table."""
    return convert(shipped("mopsim.export", f"{name}.yaml"), Target, name, f"{name}.yaml")


def header(side: Side, plan: Plan, gaps: Sequence[SpecError]) -> list[str]:
    """The lines that begin every file: what it is, what its keys were checked against, what is missing."""
    known, hardware, prediction = target(side), plan.hardware, plan.predicted
    ranks = f"{plan.strategy.world_size} ranks ({format_nodes(hardware.num_nodes)} of {hardware.name})"
    lines = [
        f"{known.title} configuration for {plan.model.name} on {ranks}, from a plan of {plan.strategy.name}",
        f"Keys checked against {known.checked}",
    ]
    if plan.edited:
        lines.append(
            f"The plan was edited since it was predicted. For the stack {plan.stack.name}: {again(plan)}"
        )
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
                fits += (
                    f" ({format_probability(described)} if {plan.stack.name} keeps the tensors that its "
                    "description says)"
                )
        promised = f"{prediction.step_time:.4g} s a step, {need:.1f} of {limit:.1f} GiB a device; {fits}"
        whole = ". Predicted for the whole plan: what is not expressed below changes it" if gaps else ""
        lines.append(f"mopsim predicts for the stack {plan.stack.name}: {promised}{whole}")
    if plan.prediction:
        lines += filter(None, [elsewhere(plan, SIDES[side]["stacks"])])
    return lines + [f"NOT EXPRESSED: {gap}" for gap in gaps]
