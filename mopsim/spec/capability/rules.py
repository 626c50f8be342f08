"""Relations between fields that a side needs beyond what each field's row says: those of rules.yaml, and
those that walk through whole specs, as whether its program is the one that a stack describes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from operator import attrgetter
from typing import Any

import msgspec

from mopsim.common.errors import SpecError
from mopsim.common.io import Spec, convert, leaves
from mopsim.common.shipped import kept
from mopsim.spec.capability.expressions import SIDES, compiled, holds
from mopsim.spec.capability.job import Job
from mopsim.spec.capability.table import EXPORTS, ROWS, RUNTIMES, Side
from mopsim.spec.has import field_of, plain
from mopsim.spec.kernels import BEYOND, DEFAULT
from mopsim.spec.model import DESCRIPTION, ModelSpec
from mopsim.spec.presets import list_models, load_model
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import list_stacks, load_stack

SHIPPED = {side: one["runs"] for side, one in SIDES.items() if "runs" in one}
"""Stacks that describe what mopexec's runtimes really do."""
_STACK, _MODEL = ([path for path, _ in leaves(spec)] for spec in (Stack, ModelSpec))


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


def software_is_the_runtimes(job: Job, side: str) -> Iterator[SpecError]:
    """Every entry of the stack that acts, and in which the table says a runtime has a part, is what the
    runtime does, on a device of some kind. An old plan has entries from before a runtime's were told apart,
    of what its network has not."""
    own = job.software
    for stack in [own, own.on_kind("cpu")] if own.cpu and job.device_kind in ("", "cpu") else [own]:
        for path, read_field, runs in _runs(side):
            says = read_field(stack)
            if path == "kernels.attention":
                yield from _attention(job, side)
            elif says not in runs and ROWS[f"stack.{path}"].acts_in(job):
                rule = " or ".join(dict.fromkeys(map(repr, runs)))
                of_cpu = says != read_field(own)
                told = path.replace("kernels.", "cpu.") if of_cpu else path
                yield SpecError(f"stack.{told}", says, f"is not {SIDES[side]['does']}, only {rule}")


@cache
def _runs(side: str) -> list[tuple[str, Callable[[Any], Any], list[Any]]]:
    """(path, how it is read, what the runtime does) of each entry of a stack that it has a part in: the
    values that the table names, else those of its shipped stack."""
    shipped = load_stack(SHIPPED[side])
    known = [shipped.on_kind(kind) for kind in ("cuda", "cpu")]
    found: list[tuple[str, Callable[[Any], Any], list[Any]]] = []
    for path, get in zip(_STACK, map(attrgetter, _STACK), strict=True):
        cell = ROWS[f"stack.{path}"].cells[side]
        if cell.reads:
            found.append((path, get, [get(one) for one in known] if cell.values is None else [*cell.values]))
    return found


def _attention(job: Job, side: str) -> Iterator[SpecError]:
    """Kernels of attention that the runtime has not on devices of the kind: a GPU's where a key names one."""
    runs, kind = SIDES[side]["attention"], job.device_kind
    stack = job.software.on_kind(kind) if kind else job.software
    for key, kernel in stack.kernels.attention.items():
        of_gpu = key not in (DEFAULT, BEYOND) or kind not in ("", "cpu")
        kinds = ["gpu"] if of_gpu else [kind] if kind else list(runs)
        works = list(dict.fromkeys(word for one in kinds for word in runs[one]))
        if kernel not in works and ROWS["stack.kernels.attention"].acts_in(job):
            on = f" on a {kinds[0].upper()}" if len(kinds) == 1 else ""
            rule = f"is not {SIDES[side]['does']}{on}, only {' or '.join(works)}"
            yield SpecError("stack.kernels.attention", {key: kernel}, rule)


def _had(job: Job) -> dict[str, dict[str, tuple[Any, ...]]]:
    """The values that the program has of each field that acts, by the condition under which it has no others
    (empty: always), of all conditions that hold."""
    entries: dict[str, dict[str, tuple[Any, ...]]] = {}
    for key, values in job.software.has.items():
        path, _, where = key.partition(" where ")
        if ROWS[field_of(path)].acts_in(job) and (not where or holds(where)(job)):
            entries.setdefault(path, {})[where] = tuple(map(plain, values))
    return entries


def _works(had: Mapping[str, tuple[Any, ...]]) -> list[Any]:
    return [one for one in next(iter(had.values())) if all(one in values for values in had.values())]


def values_had(job: Job, path: str) -> list[Any] | None:
    """Values of a field (a key of `has`) that the job's program has for it; None where it has any."""
    had = _had(job).get(path)
    return None if had is None else _works(had)


def what_the_stack_has(job: Job, side: str) -> Iterator[SpecError]:
    """Every field that acts has a value that the program can have (`Stack.has`), under all conditions that
    hold."""
    for path, had in _had(job).items():
        field = field_of(path)
        value = attrgetter(field)(job)
        if all(value in values for values in had.values()):
            continue
        works = _works(had)
        told = [where for where, values in had.items() if where and (value not in values or not works)]
        case = f" in this case ({', '.join(told).replace('_', ' ')})" if told else ""
        on = f"the stack {job.software.name}{case}"
        only = _only(works, path) if works else "nor is any other value"
        yield SpecError(field, value, f"is not {SIDES[side]['does']} on {on}, {only}")


def _only(works: list[Any], path: str) -> str:
    """'only 1 or 2': the values that a stack has; of long lists of names how many, and where they are."""
    said = " or ".join(map(in_words, works))
    lists = [one for one in works if isinstance(one, tuple) and one]
    if len(said) <= LONG or not lists[1:]:
        return f"only {said}"
    others = [in_words(one) for one in works if one not in lists]
    return f"only {' or '.join([*others, f'one of {len(lists)} sets'])} (has, {path}, of the stack)"


def in_words(value: Any, say: Callable[[Any], str] = repr) -> str:
    """A value in a message: of a list its names as in a plan's line, 'nothing' of an empty one."""
    return ("+".join(map(str, value)) or "nothing") if isinstance(value, tuple | list) else say(value)


LONG = 60
"""Characters of a list of values that is told in full."""


def what_the_target_has(job: Job, side: str) -> Iterator[SpecError]:
    """As of the job's own stack, of the one that describes a target: its own, if it is one of them."""
    stacks = SIDES[side]["stacks"]
    name = job.software.name if job.software.name in stacks else stacks[0]
    yield from what_the_stack_has(replace(job, stack=load_stack(name)), side)


def no_runtime(job: Job) -> SpecError | None:
    """The error of a stack that no runtime of mopexec runs."""
    name = job.software.name
    if job.software.runtime:
        return None
    written = "; mopsim export writes it" * any(name in one.get("stacks", ()) for one in SIDES.values())
    planned = "; mopsim search --stack NAME --runnable plans for one of them"
    rule = f"is a stack that mopexec does not run, only {', '.join(_run())}{planned}{written}"
    return SpecError("stack", name, rule)


@cache
def _run() -> list[str]:
    """The shipped stacks that a runtime of mopexec runs."""
    return [name for name in list_stacks() if load_stack(name).runtime]


def flavor_is_the_preset(job: Job, side: Side) -> Iterator[SpecError]:
    """A flavor of a target is one network: that of the preset with this name, less what it lacks of it."""
    if job.model.name not in list_models():
        return
    preset = load_model(job.model.name)
    for path in _MODEL:
        value, flavor = attrgetter(path)(job.model), attrgetter(path)(preset)
        said = ROWS[f"model.{path}"].cells[side].values is not None
        if value != flavor and not said and path not in DESCRIPTION:
            rule = f"is not {SIDES[side]['does']}'s flavor of {preset.name}: {flavor!r}"
            yield SpecError(f"model.{path}", value, rule)


ALL_RULES = [convert(one, Relation, "rule") for one in kept(__package__, "rules.yaml")]
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
