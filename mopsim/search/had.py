"""What the program of a family has of its axes, as the capability table says it: a value that is refused
whatever the others are is left out before values are multiplied."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from operator import attrgetter
from typing import cast

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from mopsim.common.errors import SpecError, shown
from mopsim.search.axes import every_axis, followed
from mopsim.search.build import build
from mopsim.search.problem import DEFAULTS, Axes, Column, Problem, Values, once
from mopsim.search.result import NOT_RUN
from mopsim.spec.capability import EXPORTS, ROWS, SIDES, Job, field_refusals, refusals
from mopsim.spec.capability.expressions import fields_read
from mopsim.spec.capability.rules import in_words, what_the_stack_has
from mopsim.spec.has import MODEL, field_of, plain
from mopsim.spec.stack import Stack
from mopsim.spec.strategy import Strategy

Key = str | tuple[str, ...]
Value = int | tuple[int, ...]
Refused = tuple[tuple[str, ...], tuple[int, ...], str]
"""Columns, their values, why rows that have them all are refused."""
Jobs = list[tuple[dict[str, int], Job]]
Sometimes = tuple[dict[str, int], SpecError]
"""Columns of rows of defaults with what they ask, or with what is refused of them."""


@dataclass(frozen=True)
class Had:
    """axes: with the values that the program has; of those that its stack does not name the ones alone that a
    target of `mopsim export` which the stack asked for describes has words for, if it is any target's.
    lacks: why the others are left out. refused: why the program has nothing of the family, or ''; its axes
    are whole then. beside: values that are refused beside another, or that mopexec does not run where that
    is asked for."""

    axes: Axes
    lacks: list[SpecError]
    refused: str
    beside: list[Refused]


def axes_of(problem: Problem, family: str) -> Axes:
    """The axes of a family and the values that its program has, the last one fastest."""
    return had(problem, family).axes


def offered(problem: Problem, family: str, column: str) -> set[int]:
    """Values of a column in a family's space: of its axis, or the default where none sets it."""
    for key, values in axes_of(problem, family).items():
        if column in names(key):
            return {columns_of(key, value)[column] for value in values}
    return {DEFAULTS[column]}


def exchanges(problem: Problem, family: str) -> list[int]:
    """How the family's program can trade a sequence; none where it has no context parallelism."""
    ways, degrees = offered(problem, family, "exchange"), offered(problem, family, "sequence")
    for key, values in axes_of(problem, family).items():
        if {"sequence", "exchange"} <= set(names(key)):
            rows = [columns_of(key, value) for value in values]
            ways = {row["exchange"] for row in rows if row["sequence"] > 1}
    return sorted(ways) if max(degrees) > 1 else []


def had(problem: Problem, family: str) -> Had:
    """What the program of a family has of its axes."""
    return once(problem.known, ("had", family), lambda: _Trials(problem, family).found())


def nothing_of(problem: Problem, family: str) -> str:
    """`Had.refused`, without the rest."""
    return once(problem.known, ("nothing of", family), lambda: _Trials(problem, family).nothing())


def refused_beside(
    problem: Problem, family: str, name: str, columns: Mapping[str, Column]
) -> NDArray[np.bool_]:
    """Which rows have a value in the column of this name that is refused beside others."""
    found = np.zeros(len(columns[name]), dtype=np.bool_)
    for about, values, _ in had(problem, family).beside:
        if name not in about:
            continue
        alike = [columns[one] == value for one, value in zip(about, values, strict=True)]
        found |= np.logical_and.reduce(alike)
    return found


def left_out(problem: Problem, family: str) -> list[str]:
    """A line that names the values of the family's axes that its program never has, and one for those of a
    field that are refused for another reason."""
    stack, lacks = problem.software(family), had(problem, family).lacks
    always = {key: [plain(one) for one in values] for key, values in stack.has.items()}
    values: dict[str, list[str]] = defaultdict(list)
    others: dict[tuple[str, str], list[str]] = defaultdict(list)
    for error in lacks:
        path = error.field.removeprefix("strategy.")
        if error.value not in always.get(path, [error.value]):
            values[path].append(in_words(error.value, str))
        else:
            others[error.field, error.rule].append(in_words(error.value, shown))
    lacking = "; ".join(f"{path} {', '.join(found)}" for path, found in values.items())
    more = [f"left out: {field}: {_said(some, rule)}" for (field, rule), some in others.items()]
    return [f"left out: {stack.name} has no {lacking}"] * bool(lacking) + more


def _said(some: list[str], rule: str) -> str:
    """'2, 4 or 8 are not in DeepSpeed': values that one rule refuses, alike of all families."""
    *first, last = sorted(some, key=lambda word: (len(word), word))
    return f"{', '.join(first)} or {last} {re.sub('^is ', 'are ', rule)}" if first else f"{last} {rule}"


def names(key: Key) -> tuple[str, ...]:
    """The columns of an axis."""
    return (key,) if isinstance(key, str) else key


def each(value: Value) -> tuple[int, ...]:
    """The value of each column of an axis."""
    return value if isinstance(value, tuple) else (value,)


def columns_of(key: Key, value: Value) -> dict[str, int]:
    """The columns that a value of an axis sets."""
    return dict(zip(names(key), each(value), strict=True))


class _Trials:
    """Every value of every axis in rows of defaults: with nothing split; without recomputation, experts and
    sequences spread, where fields of theirs act; and so with it."""

    def __init__(self, problem: Problem, family: str) -> None:
        self.problem, self.family = problem, family
        self.axes = every_axis(problem, family)
        most = {
            column: max(columns_of(key, value)[column] for value in values)
            for key, values in self.axes.items()
            for column in names(key)
        }
        split = min(problem.world_size, 2)
        spread = {"experts": most["experts"], "sequence": min(most["sequence"], split)}
        whole, kept = {"recompute": 1, "modules": 0}, {"recompute": 0, "modules": 0}
        self.contexts = (whole, kept | spread, whole | spread)
        self.built: dict[frozenset[tuple[str, int]], Strategy | None] = {}
        self.setters: dict[str, set[Key]] = {}
        self.stack = problem.software(family)
        self.named = {
            (entry.partition(" where ")[0], plain(one))
            for entry, values in self.stack.has.items()
            for one in values
        }
        self.crossed = self._crossed()
        self.stack = _with(self.stack, lambda entry: entry not in self.crossed)
        self.bound: dict[Key, bool] = {}
        self.jobs: dict[tuple[Key, Value], Jobs] = {}
        self.tried: dict[tuple[Key, Value], tuple[list[SpecError], list[Sometimes]]] = {}
        self.refused: dict[tuple[tuple[str, int], ...], set[str]] = {}

    def found(self) -> Had:
        """What is refused of single values, and of values beside recomputation."""
        lacks: dict[Key, dict[Value, SpecError]] = defaultdict(dict)
        sometimes: list[tuple[Key, Value, dict[str, int], SpecError]] = []
        unrun: list[Refused] = []
        for key, values in self.axes.items():
            for value in cast(Sequence[Value], values):
                always, some = self._tried(key, value)
                if always:
                    lacks[key][value] = always[0]
                sometimes += [(key, value, context, error) for context, error in some]
                unrun += [(names(key), each(value), why) for why in self._not_run(key, value)]
        if refused := self.nothing():
            return Had(self.axes, [], refused, unrun)
        left = {key: self._left(key, lacks[key]) for key in self.axes}
        selective = len(left.get("modules", ())) > 1
        pairs = [one for some in sometimes for one in self._pair(*some, selective=selective)]
        pairs += [one for entry, keys in self.crossed.items() for one in self._together(entry, keys, left)]
        every = [error for errors in lacks.values() for error in errors.values()]
        return Had(left, list({str(error): error for error in every}.values()), "", unrun + pairs)

    def nothing(self) -> str:
        """Why the program has nothing of the family, or '': all values of an axis are refused in all rows."""
        for key, values in self.axes.items():
            if all(self._tried(key, value)[0] for value in cast(Sequence[Value], values)):
                error = self._tried(key, values[0])[0][0]
                return str(error) if error.field.startswith(MODEL) else f"{error.field} {error.rule}"
        return ""

    def _left(self, key: Key, lacks: dict[Value, SpecError]) -> Values:
        """Values of an axis that the program has, of those the ones that a target has words for, where there
        are any; notes why the others are not."""
        had = [one for one in self.axes[key] if one not in lacks]
        mute = {one: why for one in had if (why := self._no_word(key, one))}
        if len(mute) < len(had):
            lacks.update(mute)
        return cast(Values, [one for one in had if one not in lacks])

    def _no_word(self, key: Key, value: Value) -> SpecError | None:
        """Why a value is in no target that the stack asked for describes; None where it is, where the stack
        names it (with a source: the program has what an export has no words for), or it describes none."""

        def refused(job: Job, side: str) -> Iterator[SpecError]:
            for error in field_refusals(job, by=side):
                noun, _, path = error.field.partition(".")
                if noun == "strategy" and key in self._set_by(path) and (path, error.value) not in self.named:
                    yield error

        stack = self.problem.stack.name if self.problem.stack else None
        sides = [side for side in EXPORTS if stack in SIDES[side]["stacks"]]
        jobs = self._jobs(key, value)
        found = [self._refusals(key, jobs, partial(refused, side=side))[0][:1] for side in sides]
        return found[0][0] if found and all(found) else None

    def _refused_fields(self, columns: dict[str, int]) -> set[str]:
        """Fields that are refused in a row of defaults and these columns."""

        def find() -> set[str]:
            job = self._job(columns)
            return {error.field for error in not_played(job)} if job else set()

        return once(self.refused, tuple(columns.items()), find)

    def _jobs(self, key: Key, value: Value) -> Jobs:
        """What each row asks of the program with this value, where a strategy is built of it."""

        def find() -> Jobs:
            rows = [(one, self._job(one | columns_of(key, value))) for one in self._contexts(key, value)]
            return [(context, job) for context, job in rows if job is not None]

        return once(self.jobs, (key, value), find)

    def _tried(self, key: Key, value: Value) -> tuple[list[SpecError], list[Sometimes]]:
        """`_refusals` of a value by the simulator."""
        return once(self.tried, (key, value), lambda: self._refusals(key, self._jobs(key, value)))

    def _contexts(self, key: Key, value: Value) -> Iterable[dict[str, int]]:
        """Rows that a value is tried in. Modules are recomputed where layers are not: layers that are not
        recomputed whole may have every value of theirs, and so may what a stack has under conditions. First
        rows are alike for all values of an axis."""
        first, second, _ = self.contexts
        if key == "modules":
            return (second,) if value else (second, first)
        modules = self.axes.get("modules", ()) if (key, value) == ("recompute", 0) or self._bound(key) else ()
        return (*self.contexts, *(second | {"modules": each(one)[0]} for one in modules if one))

    def _bound(self, key: Key) -> bool:
        """Whether an axis sets a field that the stack has under conditions."""
        if key not in self.bound:
            fields = [one.partition(" where ") for one in self.stack.has]
            reads = [attrgetter(field_of(name)) for name, where, _ in fields if where]
            jobs = list(self._along(key, self.axes[key], self.contexts[1]))
            self.bound[key] = any(len({read(job) for job in jobs}) > 1 for read in reads)
        return self.bound[key]

    def _job(self, columns: dict[str, int], stack: Stack | None = None) -> Job | None:
        """What a row asks of the program; None where no strategy is built of it."""
        asked = frozenset(columns.items())
        if asked not in self.built:
            try:
                row = followed(self.problem, self.family, DEFAULTS | columns)
                row = {name: int(value) for name, value in row.items()}
                self.built[asked] = build(self.family, self.problem, row)
            except SpecError:
                self.built[asked] = None
        strategy = self.built[asked]
        if strategy is None:
            return None
        p = self.problem
        return Job(p.model, strategy, p.training, stack or self.stack, p.hardware)

    def _crossed(self) -> dict[str, list[Key]]:
        """Entries of the stack whose condition several axes decide, recomputation apart, or one of which rows
        of defaults have the ends only; those axes with the ones of the field."""
        ends = self.contexts[1].keys() - self.contexts[0].keys()
        found = {}
        for entry in self.stack.has:
            path, _, where = entry.partition(" where ")
            deciding = {key for one in (fields_read(where) if where else ()) for key in self._set_by(one)}
            alone = len(deciding) == 1 and any(not ends.isdisjoint(names(key)) for key in deciding)
            if alone or len(deciding - {"recompute", "modules"}) > 1:
                every = deciding | self._set_by(path)
                found[entry] = [key for key in self.axes if key in every]
        return found

    def _together(self, entry: str, keys: list[Key], left: Axes) -> Iterator[Refused]:
        """The values of these axes that the stack refuses beside each other, for an entry and its like; of
        the others alone where every value of the field's own axes is refused."""
        path = entry.partition(" where ")[0]
        stack = _with(self.problem.software(self.family), lambda one: one.partition(" where ")[0] == path)
        own = [key for key in keys if key in self._set_by(path)]
        others = [key for key in keys if key not in own]
        for given in _rows(others, left):
            every = [given | one for one in _rows(own, left)]
            jobs = [self._job(row, stack) for row in every]
            errors = [next(what_the_stack_has(job, "simulator"), None) if job else None for job in jobs]
            found = [(row, error) for row, error in zip(every, errors, strict=True) if error]
            if len(found) == sum(job is not None for job in jobs):
                found = [(given, error) for _, error in found[:1]]
            for row, error in found:
                yield tuple(row), tuple(row.values()), f"{error.field} {error.rule}"

    def _refusals(
        self, key: Key, jobs: Jobs, refused: Callable[[Job], Iterator[SpecError]] | None = None
    ) -> tuple[list[SpecError], list[Sometimes]]:
        """Errors of fields that an axis sets, or none does: in every row where the field acts, and in one.
        refused: of a job, where it is not what the simulator refuses."""
        errors = [
            {error.field: error for error in (refused or not_played)(job) if self._mine(key, context, error)}
            for context, job in jobs
        ]
        always, sometimes = [], []
        for (context, _), here in zip(jobs, errors, strict=True):
            for field, error in here.items():
                acts = [ROWS[field].acts_in(job) for _, job in jobs]
                if all(field in one for one, act in zip(errors, acts, strict=True) if act):
                    always.append(error)
                else:
                    sometimes.append((context, error))
        return always, sometimes

    def _mine(self, key: Key, context: dict[str, int], error: SpecError) -> bool:
        """Whether the axis sets the field of an error; or no axis does, and it is the family's own, or not
        there without the axis."""
        noun, _, path = error.field.partition(".")
        if setters := self._set_by(path) if noun == "strategy" else ():
            return key in setters
        rest = {column: value for column, value in context.items() if column not in names(key)}
        return error.field in self._refused_fields(self.contexts[0]) or (
            error.field not in self._refused_fields(rest)
        )

    def _set_by(self, path: str) -> set[Key]:
        """The axes that set a field of the strategy."""
        if path not in self.setters:
            read = attrgetter(field_of(path))
            self.setters[path] = {
                key
                for key, values in self.axes.items()
                for context in self.contexts
                if len({read(job) for job in self._along(key, values, context)}) > 1
            }
        return self.setters[path]

    def _along(self, key: Key, values: Values, context: dict[str, int]) -> Iterator[Job]:
        """The jobs of an axis's values in a row."""
        return (job for value in values if (job := self._job(context | columns_of(key, value))) is not None)

    def _pair(
        self, key: Key, value: Value, context: dict[str, int], error: SpecError, *, selective: bool
    ) -> Iterator[Refused]:
        """Where it is recomputation, of layers or of modules, beside which a value is refused, their columns.
        selective: whether layers that are not recomputed whole may recompute modules."""
        given = columns_of(key, value)
        for column, without in (("recompute", 1 - context["recompute"]), ("modules", 0)):
            other = self._job(context | {column: without} | given)
            if other is None or any(one.field == error.field for one in not_played(other)):
                continue
            columns = {column: context[column]} | given
            if column == "recompute" and selective and not context["recompute"]:
                columns = {"modules": 0} | columns
            yield tuple(columns), tuple(columns.values()), f"{error.field} {error.rule}"
            return

    def _not_run(self, key: Key, value: Value) -> Iterator[str]:
        """Why mopexec does not run a value, where that is asked for."""
        for context, job in self._jobs(key, value):
            runtime = job.software.runtime
            for error in field_refusals(job, by=runtime) if self.problem.runnable and runtime else ():
                if self._mine(key, context, error):
                    yield f"{NOT_RUN}: {error}"
                    return


def _rows(keys: list[Key], axes: Axes) -> Iterator[dict[str, int]]:
    """Every row of the values of these axes."""
    columns = [column for key in keys for column in names(key)]
    for values in product(*(cast(Sequence[Value], axes[key]) for key in keys)):
        yield dict(zip(columns, (one for value in values for one in each(value)), strict=True))


def _with(stack: Stack, kept: Callable[[str], bool]) -> Stack:
    """A stack that says less of what it has."""
    return structs.replace(stack, has={one: values for one, values in stack.has.items() if kept(one)})


def not_played(job: Job) -> Iterator[SpecError]:
    """What the simulator refuses of a job."""
    try:
        job.software.check_strategy(job.strategy)
    except SpecError as error:
        yield error
    yield from refusals(job, by="simulator")
