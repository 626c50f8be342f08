"""The legal candidates of a family: the product of its axes, less the rows that break a relation."""

import ast
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from types import CodeType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mopsim.common.let import Let
from mopsim.common.shipped import kept
from mopsim.common.working import near_batches
from mopsim.search.axes import FSDP2, MINOR, followed, one_mesh
from mopsim.search.balance import balanced
from mopsim.search.had import had, names
from mopsim.search.problem import CHUNKED, DEFAULTS, ULYSSES, Axes, Problem, Values
from mopsim.search.space import Columns, Space, taken
from mopsim.search.stages import BALANCED, IDEAL, laid, lighter, parts_of, plain
from mopsim.spec.layout import MOST_MICROBATCHES

NO_CHOICE = ""
"""The reason against values of an axis that mean nothing in a row, or are not looked for there: no
candidates, and not counted."""
LEAST_ROWS, LEAST_IN_STAGES = 512, 4096
"""Tokens that a rank has of a sequence that is split beside tensors, and beside layers, at least (FSDP2)."""
Relation = tuple[str, tuple[str, ...], Callable[[Columns], NDArray[np.bool_]]]
"""What a row breaks; the columns that it is about; whether rows keep it."""
Relations = Callable[[Columns], Iterator[Relation]]
"""Those of a space, about some columns of it."""
_CODES: dict[str, Any] = {
    "ULYSSES": ULYSSES, "CHUNKED": CHUNKED, "IDEAL": IDEAL, "MOST_MICROBATCHES": MOST_MICROBATCHES,
    "LEAST_ROWS": LEAST_ROWS, "LEAST_IN_STAGES": LEAST_IN_STAGES, "max": np.maximum, "where": np.where,
}  # fmt: skip
"""Codes, limits and functions of expressions."""


def trunk(problem: Problem, family: str, axes: Axes) -> Space:
    """The legal rows of the axes that are not minor; the columns of these have no meaning yet."""
    columns, rejected, later = _product({}), Counter[str](), dict(axes)
    major = {key: values for key, values in axes.items() if key not in MINOR}
    left = math.prod(len(values) for values in major.values())
    relations = partial(_relations, problem, family, axes)
    for key, values in major.items():
        del later[key]
        left //= len(values)
        columns = _times(columns, key, values)
        about = set(names(key)) if len(later) < len(axes) - 1 else set()
        columns = _legal(relations, columns, rejected, about, _named(later), left)
    return Space(family, problem, followed(problem, family, columns), rejected)


def expanded(space: Space, axes: Axes) -> Space:
    """The rows of a trunk, each with every legal combination of the minor axes' values."""
    return balanced(multiplied(space, axes))


def multiplied(space: Space, axes: Axes) -> Space:
    """The same, before it is chosen which layout is BALANCED."""
    columns, rejected, later = space.columns, Counter(space.rejected), minor_of(axes)
    relations = partial(_relations, space.problem, space.family, axes)
    for key, values in list(later.items()):
        del later[key]
        columns = _times(columns, key, values)
        columns = _legal(relations, columns, rejected, set(names(key)), _named(later))
    return Space(space.family, space.problem, columns, rejected)


def minor_of(axes: Axes) -> Axes:
    """The minor axes among some; `MINOR` says what bounds each."""
    return {key: values for key, values in axes.items() if key in MINOR}


def _named(axes: Axes) -> set[str]:
    return {name for key in axes for name in names(key)}


def _legal(
    relations: Relations,
    columns: Columns,
    rejected: Counter[str],
    new: set[str],
    later: set[str],
    times: int = 1,
) -> Columns:
    """The rows that keep the relations about columns that are new (all, where none is named), none of which
    comes later; the others are counted, each so many times."""
    keep = np.ones(len(columns["micro_batch"]), dtype=np.bool_)
    if not keep.size:
        return columns
    for reason, about, legal in relations(columns):
        if (new and not new.intersection(about)) or later.intersection(about):
            continue
        broken = keep & ~legal(columns)
        if broken.any():
            rejected[reason] += int(broken.sum()) * times if reason != NO_CHOICE else 0
            keep &= ~broken
    return columns if keep.all() else taken(columns, np.flatnonzero(keep))


def _times(columns: Columns, key: str | tuple[str, ...], values: Values) -> Columns:
    """Every row with every value of one more axis, which varies fastest."""
    count = len(columns["micro_batch"])
    columns = taken(columns, np.repeat(np.arange(count), len(values)))
    return columns | _product({key: values}, count, names(key))


def _product(axes: Axes, repeats: int = 1, every: Iterable[str] = tuple(DEFAULTS)) -> Columns:
    """Columns of the Cartesian product, the last axis fastest, so many times over. A key that is a tuple of
    names takes tuples of values that go together. A column of one value takes no memory (a stride of 0)."""
    inner = math.prod(len(values) for values in axes.values())
    size = repeats * inner
    columns: Columns = {name: np.broadcast_to(np.int64(DEFAULTS[name]), size) for name in every}
    for key, values in axes.items():
        table = np.array(values, dtype=np.int64).reshape(len(values), -1)
        outer, inner = size // inner, inner // len(values)
        for position, name in enumerate(names(key)):
            if len(values) == 1:
                columns[name] = np.broadcast_to(table[0, position], size)
            else:
                columns[name] = np.tile(np.repeat(table[:, position], inner), outer)
    return columns


def keeping(space: Space, names: set[str], later: set[str]) -> NDArray[np.bool_]:
    """Which rows keep the relations about some columns and none of those that come later."""
    keep = np.ones(len(space), dtype=np.bool_)
    for _, about, legal in _relations(space.problem, space.family, {}, space.columns):
        if names.intersection(about) and not later.intersection(about):
            keep &= legal(space.columns)
    return keep


def _relations(problem: Problem, family: str, axes: Axes, columns: Columns) -> Iterator[Relation]:
    refused = had(problem, family).refused
    if refused:
        yield refused, (), lambda c: np.zeros(len(c["tensor"]), dtype=bool)
    said = partial(_said, _words(problem) | {"first": columns["exchange"][:1]})
    yield from said("of_ranks")
    if family in FSDP2:
        yield from (one for one in said("of_fsdp2") if not _set_at_once(axes, one[1]))
    yield from _beside(problem, family)
    yield from _over_layers(problem)
    yield from said("last")


def _words(problem: Problem) -> dict[str, Any]:
    """What an expression of relations.yaml reads beside columns."""
    model, training, world = problem.model, problem.training, problem.world_size
    return _CODES | {
        "world": world, "node": problem.hardware.devices_per_node, "heads": model.num_split_heads,
        "key_heads": model.linear_attention.num_key_heads,
        "num_experts": max(model.num_local_experts, 1), "batch": training.global_batch,
        "seq_len": training.seq_len, "one_mesh": one_mesh(problem),
        "near": near_batches(training.global_batch, world),
    }  # fmt: skip


def _said(words: Mapping[str, Any], group: str) -> Iterator[Relation]:
    """The relations of a group of relations.yaml."""
    for one in kept(__package__, "relations.yaml")[group]:
        about, code = _read(one["needs"])
        yield one.get("else", NO_CHOICE).format_map(words), about, partial(_holds, code, words)


def _holds(code: CodeType, words: Mapping[str, Any], c: Columns) -> NDArray[np.bool_]:
    return np.asarray(eval(code, {**words, **c}), dtype=np.bool_)


@cache
def _read(needs: str) -> tuple[tuple[str, ...], CodeType]:
    """(the columns that an expression reads, what it compiles to)."""
    let = Let(kept(__package__, "relations.yaml")["let"])
    tree = ast.fix_missing_locations(let.visit(ast.parse(needs, mode="eval")))
    read = dict.fromkeys(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
    return tuple(name for name in read if name in DEFAULTS), compile(tree, needs, "eval")


def _set_at_once(axes: Axes, about: Iterable[str]) -> bool:
    """Whether one axis alone varies any of these columns: who made it has chosen what goes together."""
    return sum(len(values) > 1 and not set(names(key)).isdisjoint(about) for key, values in axes.items()) == 1


def _beside(problem: Problem, family: str) -> Iterator[Relation]:
    """What the family's program cannot have, and what mopexec does not run where that is asked for, whatever
    the other columns are, as the capability table says it."""
    for about, value, reason in had(problem, family).beside:
        yield (
            reason,
            about,
            lambda c, about=about, value=value: np.logical_or.reduce(  # type: ignore[misc]
                [c[name] != one for name, one in zip(about, value, strict=True)]
            ),
        )


def _over_layers(problem: Problem) -> Iterable[Relation]:
    """Layouts that lay the layers over a pipeline in a way of their own; uneven ones where none is better."""

    def legal(stages: int, virtual: int, layout: int) -> bool:
        every = lighter if layout == BALANCED else plain
        found = every(problem.model, stages, virtual)
        return layout == IDEAL or (bool(found) if layout == BALANCED else layout in found)

    def kept(c: Columns) -> NDArray[np.bool_]:
        values, places = np.unique(laid(c), return_inverse=True)
        table = [legal(*parts_of(code)) for code in values.tolist()]
        return np.asarray(np.array(table, dtype=np.bool_)[places])

    yield NO_CHOICE, ("virtual_stages", "pipeline"), kept
