"""The legal candidates of a family: the product of its axes, less the rows that break a relation."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mopsim.common.working import near_batches
from mopsim.search.axes import FSDP2, MINOR, followed, one_mesh
from mopsim.search.balance import balanced
from mopsim.search.had import had, names
from mopsim.search.problem import CHUNKED, DEFAULTS, ULYSSES, Axes, Column, Problem, Values, tokens
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
RANKS, MESH = ("pipeline", "tensor", "sequence"), ("pipeline", "experts", "expert_tensor")
"""Columns that place all but experts, and experts."""


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
    yield from _over_ranks(problem)
    yield from _over_experts(problem)
    yield from _over_copies(problem)
    if family in FSDP2:
        yield from (one for one in _together(problem) if not _set_at_once(axes, one[1]))
    yield from _beside(problem, family)
    yield from _over_layers(problem)
    yield (
        "more chunks than tokens",
        ("chunks", "ffn_slices", "loss_slices", "micro_batch", "sequence"),
        lambda c: np.maximum.reduce([c["chunks"], c["ffn_slices"], c["loss_slices"]]) <= tokens(problem, c),
    )
    yield (
        NO_CHOICE,  # modules are recomputed where layers are not
        ("modules", "recompute"),
        lambda c: (c["modules"] == 0) | (c["recompute"] == 0),
    )
    yield (
        NO_CHOICE,  # kernels are kept where layers are recomputed
        ("saved", "recompute"),
        lambda c: (c["saved"] == 0) | (c["recompute"] == 1),
    )
    yield (
        NO_CHOICE,  # slices of the vocabulary have a loss of their own
        ("loss", "tensor"),
        lambda c: (c["loss"] != CHUNKED) | (c["tensor"] == 1),
    )
    yield (
        NO_CHOICE,  # a way to reach experts is chosen where they are on other ranks
        ("dispatcher", "experts"),
        lambda c: (c["dispatcher"] == 0) | (c["experts"] > 1),
    )
    yield (
        NO_CHOICE,  # exchanges of experts overlap where they are on other ranks, and between virtual stages
        ("overlap", "virtual_stages", "experts", "pipeline"),
        lambda c: (
            (c["overlap"] == 0)
            | ((c["experts"] > 1) & ((c["pipeline"] == 1) | (c["virtual_stages"] > 1)))
            | (c["layout"] == IDEAL)
        ),
    )
    yield (
        NO_CHOICE,  # a way to trade a sequence is chosen where it is split
        ("exchange", "sequence"),
        lambda c: (c["exchange"] == columns["exchange"][0]) | (c["sequence"] > 1),
    )
    yield (
        NO_CHOICE,  # a placement of experts is chosen where it differs
        ("strided", "experts", "pipeline"),
        lambda c: (
            (c["strided"] == 0) | ((c["experts"] > 1) & (c["experts"] < problem.world_size // c["pipeline"]))
        ),
    )


def _set_at_once(axes: Axes, about: Iterable[str]) -> bool:
    """Whether one axis alone varies any of these columns: who made it has chosen what goes together."""
    return sum(len(values) > 1 and not set(names(key)).isdisjoint(about) for key, values in axes.items()) == 1


def _over_ranks(problem: Problem) -> Iterable[Relation]:
    world, model, training = problem.world_size, problem.model, problem.training
    batch = training.global_batch

    def stage(c: Columns) -> Column:
        return world // c["pipeline"]

    def groups(c: Columns) -> Column:
        return np.asarray(stage(c) // np.maximum(c["tensor"] * c["sequence"], 1))

    yield (
        "tensor x sequence does not divide the ranks of a stage",
        RANKS,
        lambda c: stage(c) % (c["tensor"] * c["sequence"]) == 0,
    )
    yield (
        "tensor x sequence does not divide num_attention_heads, which Ulysses splits",
        ("exchange", "tensor", "sequence"),
        lambda c: (
            (c["exchange"] != ULYSSES) | (model.num_attention_heads % (c["tensor"] * c["sequence"]) == 0)
        ),
    )
    yield (
        f"global batch is not a multiple of micro_batch x data groups{near_batches(batch, world)}",
        ("micro_batch", *RANKS),
        lambda c: batch % (c["micro_batch"] * np.maximum(groups(c), 1)) == 0,
    )
    yield (
        f"more than {MOST_MICROBATCHES} microbatches",
        ("micro_batch", *RANKS),
        lambda c: batch // (c["micro_batch"] * np.maximum(groups(c), 1)) <= MOST_MICROBATCHES,
    )
    yield (
        "seq_len is not a multiple of the sequence split",
        ("tensor", "sequence"),
        lambda c: training.seq_len % (c["sequence"] * c["tensor"]) == 0,
    )
    yield (
        "microbatches are not a multiple of the stages, as interleaving needs",
        ("virtual_stages", "micro_batch", *RANKS),
        lambda c: (
            (c["virtual_stages"] == 1)
            | (batch // (c["micro_batch"] * np.maximum(groups(c), 1)) % c["pipeline"] == 0)
        ),
    )


def _over_experts(problem: Problem) -> Iterable[Relation]:
    experts = max(problem.model.num_local_experts, 1)

    def stage(c: Columns) -> Column:
        return problem.world_size // c["pipeline"]

    yield (
        "experts x expert_tensor does not divide the ranks of a stage",
        MESH,
        lambda c: stage(c) % (c["experts"] * c["expert_tensor"]) == 0,
    )
    yield (
        "expert degree does not divide num_local_experts",
        ("experts",),
        lambda c: experts % c["experts"] == 0,
    )
    yield (
        "expert shard does not divide the expert replicas",
        (*MESH, "expert_shard"),
        lambda c: stage(c) // (c["experts"] * c["expert_tensor"]) % c["expert_shard"] == 0,
    )


def _over_copies(problem: Problem) -> Iterable[Relation]:
    """Of one copy of the state in each node."""
    node, together = problem.hardware.devices_per_node, one_mesh(problem)

    def share(c: Columns) -> Column:
        return np.asarray(np.maximum(c["tensor"], together * c["experts"] * c["expert_tensor"]))

    def stage(c: Columns) -> Column:
        return problem.world_size // c["pipeline"]

    yield (
        NO_CHOICE,
        ("in_node", "pipeline"),
        lambda c: (c["in_node"] == 0) | ((stage(c) > node) & (stage(c) % node == 0)),
    )
    yield (
        "a copy of the state in a node has not all places of its tensors and experts",
        ("in_node", "tensor", "experts", "expert_tensor"),
        lambda c: (c["in_node"] == 0) | ((node % c["tensor"] == 0) & (node % share(c) == 0)),
    )


def _together(problem: Problem) -> Iterable[Relation]:
    """What FSDP2 is looked for beside tensors or layers that are split."""
    training, world = problem.training, problem.world_size

    def whole(c: Columns) -> NDArray[np.bool_]:
        return np.asarray((c["tensor"] == 1) & (c["pipeline"] == 1))

    def ranks(c: Columns) -> Column:
        return np.asarray(c["sequence"] * c["tensor"])

    def microbatches(c: Columns) -> Column:
        groups = world // np.maximum(c["pipeline"] * c["tensor"] * c["sequence"], 1)
        return np.asarray(training.global_batch // (c["micro_batch"] * np.maximum(groups, 1)))

    yield (
        NO_CHOICE,
        ("tensor", "expert_tensor"),
        lambda c: (c["expert_tensor"] == 1) | (c["expert_tensor"] == c["tensor"]),
    )
    yield NO_CHOICE, ("offload", "pipeline"), lambda c: (c["offload"] == 0) | (c["pipeline"] == 1)
    yield (
        NO_CHOICE,
        ("offload", "modules", "saved"),
        lambda c: (c["offload"] == 0) | ((c["modules"] == 0) & (c["saved"] == 0)),
    )
    yield (
        NO_CHOICE,
        ("loss", "pipeline"),
        lambda c: (c["loss"] != CHUNKED) | (c["pipeline"] == 1),
    )
    yield NO_CHOICE, ("in_node", "pipeline"), lambda c: (c["in_node"] == 0) | (c["pipeline"] == 1)
    yield (
        NO_CHOICE,
        RANKS,
        lambda c: (
            (c["sequence"] == 1)
            | whole(c)
            | (training.seq_len >= np.where(c["pipeline"] > 1, LEAST_IN_STAGES, LEAST_ROWS) * ranks(c))
        ),
    )
    yield (
        NO_CHOICE,  # fewer microbatches than stages
        ("micro_batch", *RANKS),
        lambda c: (c["pipeline"] == 1) | (microbatches(c) >= c["pipeline"]),
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

    yield NO_CHOICE, ("virtual_stages", "pipeline"), kept
