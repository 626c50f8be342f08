"""The legal candidates of a family: the product of its axes, less the rows that break a relation."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from mopsim.common.working import near_batches
from mopsim.search.axes import MINOR
from mopsim.search.balance import balanced
from mopsim.search.had import had, names
from mopsim.search.problem import DEFAULTS, ULYSSES, Axes, Column, Problem, Values, tokens
from mopsim.search.space import Columns, Space, taken
from mopsim.search.stages import BALANCED, IDEAL, laid, lighter, parts_of, plain
from mopsim.spec.layout import MOST_MICROBATCHES

NO_CHOICE = ""
"""The reason against values of an axis that mean nothing in a row: no candidates, and not counted."""
Relation = tuple[str, tuple[str, ...], Callable[[Columns], NDArray[np.bool_]]]
"""What a row breaks; the columns that it is about beside those of the ranks; whether rows keep it."""


def trunk(problem: Problem, family: str, axes: Axes) -> Space:
    """The legal rows of the axes that are not minor; the columns of these have no meaning yet."""
    minor = minor_of(axes)
    columns = _product({key: values for key, values in axes.items() if key not in minor})
    rejected: Counter[str] = Counter()
    return Space(family, problem, _legal(problem, family, columns, rejected, set(), _named(minor)), rejected)


def expanded(space: Space, axes: Axes) -> Space:
    """The rows of a trunk, each with every legal combination of the minor axes' values."""
    return balanced(multiplied(space, axes))


def multiplied(space: Space, axes: Axes) -> Space:
    """The same, before it is chosen which layout is BALANCED."""
    columns, rejected, later = space.columns, Counter(space.rejected), minor_of(axes)
    for key, values in list(later.items()):
        del later[key]
        columns = _times(columns, key, values)
        columns = _legal(space.problem, space.family, columns, rejected, set(names(key)), _named(later))
    return Space(space.family, space.problem, columns, rejected)


def minor_of(axes: Axes) -> Axes:
    """The minor axes among some; `MINOR` says what bounds each."""
    return {key: values for key, values in axes.items() if key in MINOR}


def _named(axes: Axes) -> set[str]:
    return {name for key in axes for name in names(key)}


def _legal(
    problem: Problem, family: str, columns: Columns, rejected: Counter[str], new: set[str], later: set[str]
) -> Columns:
    """The rows that keep the relations about columns that are new (all, where none is named), none of which
    comes later; the others are counted."""
    keep = np.ones(len(columns["micro_batch"]), dtype=np.bool_)
    if not keep.size:
        return columns
    for reason, about, legal in _relations(problem, family, columns):
        if (new and not new.intersection(about)) or later.intersection(about):
            continue
        broken = keep & ~legal(columns)
        if broken.any():
            rejected[reason] += int(broken.sum()) if reason != NO_CHOICE else 0
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


def _relations(problem: Problem, family: str, columns: Columns) -> Iterator[Relation]:
    refused = had(problem, family).refused
    if refused:
        yield refused, (), lambda c: np.zeros(len(c["tensor"]), dtype=bool)
    yield from _over_ranks(problem)
    yield from _beside(problem, family)
    yield from _over_layers(problem)
    yield (
        "more chunks than tokens",
        ("chunks", "ffn_slices", "loss_slices"),
        lambda c: np.maximum.reduce([c["chunks"], c["ffn_slices"], c["loss_slices"]]) <= tokens(problem, c),
    )
    yield (
        NO_CHOICE,  # modules are recomputed where layers are not
        ("modules",),
        lambda c: (c["modules"] == 0) | (c["recompute"] == 0),
    )
    yield (
        NO_CHOICE,  # a way to reach experts is chosen where they are on other ranks
        ("dispatcher",),
        lambda c: (c["dispatcher"] == 0) | (c["experts"] > 1),
    )
    yield (
        NO_CHOICE,  # exchanges of experts overlap where they are on other ranks, and between virtual stages
        ("overlap", "virtual_stages"),
        lambda c: (
            (c["overlap"] == 0)
            | ((c["experts"] > 1) & ((c["pipeline"] == 1) | (c["virtual_stages"] > 1)))
            | (c["layout"] == IDEAL)
        ),
    )
    yield (
        NO_CHOICE,  # a way to trade a sequence is chosen where it is split
        ("exchange",),
        lambda c: (c["exchange"] == columns["exchange"][0]) | (c["sequence"] > 1),
    )
    yield (
        NO_CHOICE,  # a placement of experts is chosen where it differs
        ("strided",),
        lambda c: (
            (c["strided"] == 0) | ((c["experts"] > 1) & (c["experts"] < problem.world_size // c["pipeline"]))
        ),
    )


def _over_ranks(problem: Problem) -> Iterable[Relation]:
    world, model, training = problem.world_size, problem.model, problem.training
    batch = training.global_batch
    experts = max(model.num_local_experts, 1)

    def stage(c: Columns) -> Column:
        return world // c["pipeline"]

    def groups(c: Columns) -> Column:
        return np.asarray(stage(c) // np.maximum(c["tensor"] * c["sequence"], 1))

    yield (
        "tensor x sequence does not divide the ranks of a stage",
        (),
        lambda c: stage(c) % (c["tensor"] * c["sequence"]) == 0,
    )
    yield (
        "experts x expert_tensor does not divide the ranks of a stage",
        (),
        lambda c: stage(c) % (c["experts"] * c["expert_tensor"]) == 0,
    )
    yield (
        "tensor x sequence does not divide num_attention_heads, which Ulysses splits",
        ("exchange",),
        lambda c: (
            (c["exchange"] != ULYSSES) | (model.num_attention_heads % (c["tensor"] * c["sequence"]) == 0)
        ),
    )
    yield "expert degree does not divide num_local_experts", (), lambda c: experts % c["experts"] == 0
    yield (
        "expert shard does not divide the expert replicas",
        (),
        lambda c: stage(c) // (c["experts"] * c["expert_tensor"]) % c["expert_shard"] == 0,
    )
    yield (
        f"global batch is not a multiple of micro_batch x data groups{near_batches(batch, world)}",
        (),
        lambda c: batch % (c["micro_batch"] * np.maximum(groups(c), 1)) == 0,
    )
    yield (
        f"more than {MOST_MICROBATCHES} microbatches",
        (),
        lambda c: batch // (c["micro_batch"] * np.maximum(groups(c), 1)) <= MOST_MICROBATCHES,
    )
    yield (
        "seq_len is not a multiple of the sequence split",
        (),
        lambda c: training.seq_len % (c["sequence"] * c["tensor"]) == 0,
    )
    yield (
        "microbatches are not a multiple of the stages, as interleaving needs",
        ("virtual_stages",),
        lambda c: (
            (c["virtual_stages"] == 1)
            | (batch // (c["micro_batch"] * np.maximum(groups(c), 1)) % c["pipeline"] == 0)
        ),
    )


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

    yield NO_CHOICE, ("virtual_stages",), kept
