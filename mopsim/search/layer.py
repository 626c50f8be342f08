"""What a layer takes at least, by the pieces of reference rows: bytes kept for its backward, and seconds in
which the compute stream is busy."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeVar

import numpy as np

from mopsim.search.had import exchanges, offered, refused_beside
from mopsim.search.learn import firsts
from mopsim.search.pieces import LAYER, LOSS, Pieces, PipelinePart
from mopsim.search.problem import EXCHANGES, LEANEST, RING, SAVED, ULYSSES, Column, once
from mopsim.search.space import Space
from mopsim.search.stages import kinds
from mopsim.search.wires import Reals

Found = TypeVar("Found")
MOST = 1 << 16
"""Above any degree: codes of shapes count in it."""

SHAPES = (
    "micro_batch", "tensor", "sequence", "experts", "expert_tensor", "chunks", "ffn_slices", "dispatcher",
    "recompute", "loss", "loss_slices",
)  # fmt: skip
"""Columns by which references are chosen."""
WAYS = ("forward", "backward")
BEST = 0.99
"""Of a reference's seconds: some rows are faster for each token by up to 0.4 %."""


@dataclass(frozen=True)
class Least:
    """Seconds of the compute stream by a code of shapes (a row each); of layers by way (WAYS) and kind."""

    codes: Column
    seconds: Reals

    @staticmethod
    def of(codes: Column, *references: Space, part: int) -> "Least":
        """references: one or several of each code, of which the least counts; part: see `_seconds`."""
        found = [[_seconds(one, place, part) for place in range(len(one))] for one in references]
        return Least(np.unique(codes), np.array(found).min(axis=0))

    def at(self, codes: Column) -> Reals:
        return np.asarray(self.seconds[np.searchsorted(self.codes, codes)])


@dataclass(frozen=True)
class Layer:
    """Of a layer's forward and backward, at least.

    few: the first row of the space with each combination of SHAPES.
    kept: bytes of a token left for the backward beside the layer's input, by what is recomputed
    (`recomputed`) and the kind of layer; height: the most that the backward takes above its start, by what is
    recomputed. Both 0 under a runtime that recomputes every layer and frees as it goes. again: seconds of the
    compute stream that recomputing adds for a token, by what is recomputed and the kind.
    """

    space: Space
    few: Space
    kept: Reals
    height: Reals
    again: Reals

    @staticmethod
    def of(space: Space, each: float) -> "Layer":
        """each: bytes of an element."""
        few = space.take(firsts([space.columns[name] for name in SHAPES], len(space)))
        experts, alike = few.columns["experts"], np.zeros(len(few), dtype=np.int64)
        split = few.columns["expert_tensor"]
        rows = [_reference(few, alike, split, first) for first in (experts, _apart(experts), -experts)]
        if space.stack.kernels.gate_up == "separate":  # one product where tensors are split (Passes)
            ways = _reference(few, _splits(few), split, experts)
            rows += [ways.part(at, at + 1) for at in range(len(ways))]
        small = {name: int(few.columns[name].max()) for name in ("chunks", "ffn_slices")}
        references = [
            row.having(exchange=exchange, **small)
            for row in rows
            for exchange in (range(len(EXCHANGES)) if row.columns["sequence"][0] > 1 else (ULYSSES,))
        ]
        every = [_known(one, "kept", lambda one: _by_recomputation(one, each)) for one in references]
        found = [one for one in every if one[1].any()] or every[:1]
        return Layer(space, few, *(np.minimum.reduce(parts) for parts in zip(*found, strict=True)))

    @cached_property
    def fixed(self) -> Least:
        """Of one microbatch, all but experts: with the fewest ranks that share them, or a sequence (around a
        ring, its attention is in more and smaller parts)."""
        codes, c = _dense_shapes(self.few), self.few.columns
        experts = c["expert_tensor"], c["experts"]
        rows = (_reference(self.few, codes, *first) for first in (experts, (c["sequence"], *experts)))
        return Least.of(codes, *rows, part=0)

    @cached_property
    def routed(self) -> Least:
        """Of a token's experts: of most tokens on one rank, on the fewest that exchange them, or on the most,
        where each of a rank's experts adds a gradient of all rows (expert_padding)."""
        codes, experts = _expert_shapes(self.few), self.few.columns["experts"]
        split = self.few.columns["expert_tensor"]
        alone = self.space.stack.kernels.expert_padding in ("busiest", "fresh")
        ranks = (experts, _apart(experts), *[MOST - experts] * alone)
        most = [(one << 40) - _tokens(self.few) for one in ranks]
        return Least.of(codes, *(_reference(self.few, codes, split, one) for one in most), part=1)

    @cached_property
    def loss(self) -> Least:
        """Of one microbatch's final norm, projection and cross entropy, where no ring passes it on."""
        space = self.few.take(np.flatnonzero(self.few.columns["loss"] != RING))
        codes = _loss_shapes(space)
        rows = space.take(np.unique(codes, return_index=True)[1])
        seconds = [_known(rows, "loss", _loss, place, LOSS) for place in range(len(rows))]
        return Least(np.unique(codes), np.array(seconds))

    def loss_at(self, space: Space) -> Reals:
        """Seconds in which the compute stream is busy with the loss of one microbatch, of each row; 0 where
        it goes round a ring."""
        at = np.flatnonzero(space.columns["loss"] != RING)
        found = np.zeros(len(space))
        found[at] = self.loss.at(_loss_shapes(space.take(at)))
        return found

    @cached_property
    def hidden(self) -> Least:
        """Share of a layer's waits that are hidden where a forward is woven with a backward, expected: of the
        middle row of each way to split it."""
        woven = self.space.take(np.flatnonzero(self.space.columns["overlap"]))
        codes = _ways(woven)
        order = np.lexsort((woven.columns["experts"], codes))
        _, first, count = np.unique(codes[order], return_index=True, return_counts=True)
        rows = woven.take(order[first + count // 2])
        found = [_known(rows, "hidden", _hidden, place) for place in range(len(rows))]
        return Least(np.unique(codes), np.array(found))

    def hidden_at(self, space: Space) -> Reals:
        """That of each row, 0 where nothing is woven."""
        at = np.flatnonzero(space.columns["overlap"])
        found = np.zeros(len(space))
        if len(at):
            found[at] = self.hidden.at(_ways(space.take(at)))
        return found

    def busy(self, space: Space) -> Reals:
        """Seconds in which the compute stream is, of each row, way (WAYS) and kind of layer, one
        microbatch."""
        each = self.routed.at(_expert_shapes(space))
        each[:, 1] += self.again[recomputed(space.columns)]
        found = self.fixed.at(_dense_shapes(space)) + each * _tokens(space)[:, None, None]
        return np.asarray(BEST * found)


def recomputed(columns: Mapping[str, Column]) -> Column:
    """Places in `Layer.kept`, `height` and `again`: all is recomputed, or all but kernels of a code, or
    modules of a code."""
    saved = columns["saved"]
    return np.where(
        columns["recompute"] == 1, np.where(saved > 0, 1 + LEANEST + saved, 0), 1 + columns["modules"]
    )


def _tokens(space: Space) -> Column:
    """Tokens of a microbatch that a rank passes through experts."""
    return space.tokens() // space.columns["tensor"]


def _dense_shapes(space: Space) -> Column:
    return space.tokens() * MOST + space.columns["tensor"]


def _expert_shapes(space: Space) -> Column:
    """Rows of an expert's products at a time, as if it had all; ranks that split it."""
    c = space.columns
    rows = _tokens(space) * c["experts"] // np.maximum(c["chunks"], 1)
    return np.asarray(rows * MOST + c["expert_tensor"])


def _loss_shapes(space: Space) -> Column:
    c = space.columns
    return np.asarray(((space.tokens() * MOST + c["tensor"]) << 8) + (c["loss_slices"] << 2) + c["loss"])


def _ways(space: Space) -> Column:
    """Ways to split a layer, by what its ranks exchange."""
    c = space.columns
    return np.asarray((_splits(space) * len(EXCHANGES) + c["exchange"]) * 2 + (c["sequence"] > 1))


def _splits(space: Space) -> Column:
    """Which tensors are split: none, those of experts, others, all."""
    c = space.columns
    return np.asarray((c["tensor"] > 1) * 2 + (c["expert_tensor"] > 1))


def _apart(experts: Column) -> Column:
    """Ranks of experts, those of one that has all last."""
    return np.where(experts > 1, experts, MOST)


def _reference(space: Space, codes: Column, *first: Column) -> Space:
    """The row of each code whose layers and sequences are split least; first: what decides before sequences
    do, the least of one after the other."""
    c, heads = space.columns, space.problem.model.num_split_heads
    rows = space.take(_least(codes, *first, c["sequence"], c["tensor"], -c["micro_batch"]))
    once = max(offered(space.problem, space.family, "dispatcher")) if c["dispatcher"].any() else 0
    whole = heads % (rows.columns["sequence"] * rows.columns["tensor"]) == 0
    traded = rows.having(exchange=ULYSSES).columns
    whole &= ~refused_beside(space.problem, space.family, "exchange", traded)
    ways = exchanges(space.problem, space.family) or [ULYSSES]
    usual = {
        "virtual_stages": 1, "layout": 0, "boundary_host": 0, "overlap": 0, "modules": 0, "saved": 0,
        "recompute": c["recompute"].min(), "ffn_slices": 1,
        "exchange": np.where(whole & (ULYSSES in ways), ULYSSES, ways[-1]),
        "dispatcher": np.where(rows.columns["experts"] > 1, once, 0),
    }  # fmt: skip
    columns = {name: np.broadcast_to(np.asarray(value, np.int64), len(rows)) for name, value in usual.items()}
    return Space(space.family, space.problem, rows.columns | columns)


def _least(codes: Column, *keys: Column) -> Column:
    """The first row of each code, ascending, of those that have the least of one key after the other."""
    every, at = np.unique(codes, return_inverse=True)
    left = np.arange(len(codes))
    for key in keys:
        least = np.full(len(every), np.iinfo(np.int64).max)
        np.minimum.at(least, at, key[left])
        kept = key[left] == least[at]
        left, at = left[kept], at[kept]
    return np.asarray(left[np.unique(at, return_index=True)[1]])


def _known(
    row: Space, what: str, find: Callable[[Space], Found], place: int = 0, about: Sequence[str] = LAYER
) -> Found:
    """What was found of a row before, on this problem."""
    values = row.row(place)
    key = (what, row.family, *(values[name] for name in about))
    return once(row.problem.known, key, lambda: find(row.part(place, place + 1)))


def _seconds(rows: Space, place: int, part: int) -> Reals:
    """All but experts (part 0), or experts of a token (1), by way and kind of layer; 0 where a rule refuses
    the row."""
    return _known(rows, f"busy {part}", partial(_busy, part=part), place)


def _busy(row: Space, part: int) -> Reals:
    order, layers = kinds(row.problem.model), Pieces(row).layers(0)
    found = np.zeros((len(WAYS), len(order)))
    for at, kind in enumerate(order):
        if layers and (kind.routed or not part):
            ways = layers[kind].compute
            found[:, at] = [one.routed if part else one.all - one.routed for one in ways]
    return found / _tokens(row) if part else found


def _hidden(row: Space) -> float:
    """Share of the waits of a layer with experts."""
    pieces, kind = Pieces(row), [kind for kind in kinds(row.problem.model) if kind.routed][-1:]
    layers = pieces.layers(0)
    if not kind or layers is None:
        return 0.0
    alone, woven = layers[kind[0]], pieces.woven(0, PipelinePart(tuple(kind)), PipelinePart(tuple(kind)))
    return (alone.chain - woven.chain) / max(alone.chain - alone.busy, 1e-12)


def _loss(row: Space) -> float:
    found = Pieces(row).loss(0)
    return found.busy if found else 0.0


def _by_recomputation(row: Space, each: float) -> tuple[Reals, Reals, Reals]:
    order = kinds(row.problem.model)
    kept, again = np.zeros((2, LEANEST + 1 + len(SAVED), len(order)))
    height = np.zeros(len(kept))
    if row.stack.explicit:
        return kept, height, again
    tokens, hidden = float(_tokens(row)[0]), row.problem.model.hidden_size * each
    made, least, asked = [], Pieces(row).layers(0), (row.problem, row.family)
    for chosen in (
        *({"recompute": 1, "modules": 0, "saved": one} for one in sorted(offered(*asked, "saved"))),
        *({"recompute": 0, "modules": one, "saved": 0} for one in sorted(offered(*asked, "modules"))),
    ):
        few = row.having(**chosen)
        code, layers = int(recomputed(few.columns)[0]), Pieces(few).layers(0)
        if layers and least:
            if not chosen["recompute"]:
                made.append(code)
            kept[code] = [max(0.0, layers[kind].left / tokens - hidden) for kind in order]
            height[code] = max(0.0, min(one.height for one in layers.values()) / tokens)
            again[code] = [max(0.0, layers[kind].busy - least[kind].busy) / tokens for kind in order]
    some, leanest = made or [0], 1 + LEANEST
    for found in (kept, height, again):
        found[leanest] = found[some].min(axis=0)
    return kept, height, again
