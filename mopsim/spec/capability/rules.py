"""Relations between fields that a side needs beyond what each field's row says: those of rules.yaml, and two
that walk through whole specs."""

from collections.abc import Callable, Iterator
from functools import cache
from operator import attrgetter
from typing import Any

import msgspec
from msgspec import Struct, structs

from mopsim.common.errors import SpecError
from mopsim.common.io import Spec, convert
from mopsim.spec.capability.expressions import SIDES, compiled, read
from mopsim.spec.capability.job import Job
from mopsim.spec.capability.software import (
    software_is_the_runtimes,
    what_the_stack_has,
    what_the_target_has,
)
from mopsim.spec.capability.table import EXPORTS, ROWS, RUNTIMES, Side
from mopsim.spec.model import DESCRIPTION
from mopsim.spec.presets import list_models, load_model


class Relation(Spec, frozen=True, kw_only=True, rename={"otherwise": "else"}):
    """One entry of rules.yaml, as its head says."""

    sides: tuple[str, ...]
    field: str
    needs: str
    otherwise: str
    where: str = "True"
    let: dict[str, str] = msgspec.field(default_factory=dict)

    @property
    def fields(self) -> list[str]:
        before, _, names = self.field.rstrip("}").partition("{")
        return [before + name for name in names.split() or [""]]

    def refused(self, job: Job, side: Side) -> Iterator[SpecError]:
        """The errors of the fields that break it."""
        where, needs, fields = _ready(self)
        if not where(job):
            return
        for path in fields:
            found = value_at(job, path)
            if found and not needs(job, *found):
                rule = compiled(self.otherwise, self.let, message=True)(job, *found, SIDES[side]["does"])
                yield SpecError(path, found[0], rule)

    def __hash__(self) -> int:
        return id(self)


@cache
def _ready(rule: Relation) -> tuple[Callable[..., bool], Callable[..., bool], list[str]]:
    """What a rule says, compiled when it is first asked."""
    return compiled(rule.where, rule.let), compiled(rule.needs, rule.let), rule.fields


def value_at(job: Job, path: str) -> tuple[Any] | None:
    """The value of a field of the job; None where its noun is not known yet."""
    noun, read_field = _reader(path)
    spec = job.software if noun == "stack" else getattr(job, noun)
    return None if spec is None else (read_field(spec),)


@cache
def _reader(path: str) -> tuple[str, Callable[[Any], Any]]:
    noun, _, inner = path.partition(".")
    return noun, attrgetter(inner)


def flavor_is_the_preset(job: Job, side: Side) -> Iterator[SpecError]:
    """A flavor of a target is one network: that of the preset with this name, less what it lacks of it."""
    if job.model.name not in list_models():
        return
    preset = load_model(job.model.name)
    flavors = dict(_values(preset))
    for path, value in _values(job.model):
        flavor, said = flavors[path], ROWS[f"model.{path}"].cells[side].values is not None
        if value != flavor and not said and path not in DESCRIPTION:
            rule = f"is not {SIDES[side]['does']}'s flavor of {preset.name}: {flavor!r}"
            yield SpecError(f"model.{path}", value, rule)


def _values(spec: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every field that holds no struct."""
    for one in structs.fields(spec):
        value = getattr(spec, one.name)
        if isinstance(value, Struct):
            yield from _values(value, f"{prefix}{one.name}.")
        else:
            yield f"{prefix}{one.name}", value


ALL_RULES = [convert(one, Relation, "rule") for one in read("rules.yaml")]
RULES: dict[Side, list[Callable[[Job, Side], Iterator[SpecError]]]] = {
    side: [
        *([software_is_the_runtimes] if side in RUNTIMES else []),
        *([what_the_stack_has] if side == "simulator" else []),
        *([what_the_target_has] if side in EXPORTS else []),
        *([flavor_is_the_preset] if SIDES[side].get("flavors") else []),
        *(rule.refused for rule in ALL_RULES if side in rule.sides),
    ]
    for side in SIDES
}
