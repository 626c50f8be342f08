"""Layers of flat units as their program issues them: exchanges of tokens wait for those of weights that are
in front of them on the same fabric (mopsim.program.pairs.flat_units)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from mopsim.search.flow import COMPUTE, Flow, Issue, Priced, alone
from mopsim.search.pieces import LayerPiece
from mopsim.spec.model import LayerKind, ModelSpec

FREE = Issue(0.0, 0.0, 0.0, False)
Sent = tuple[tuple[int, float], ...]
"""(Fabric, seconds) of each exchange of a layer's weights or gradients."""


@dataclass(frozen=True)
class Sendings:
    """Of one kind of layer: how its weights are gathered, its gradients of all but experts and of experts
    reduced."""

    gathered: Sent
    dense: Sent
    routed: Sent


@dataclass(frozen=True)
class LayerPlace:
    """A layer in a pass. ahead: kind of the layer whose weights are gathered meanwhile; behind: of the one
    before it, whose gradients are reduced. None where there is none."""

    kind: LayerKind
    ahead: LayerKind | None
    behind: LayerKind | None = None


@cache
def places(model: ModelSpec, prefetch: int, *, forward: bool) -> dict[LayerPlace, int]:
    """How many layers of a pass are in each place."""
    layers = [model.layer_kind(layer) for layer in range(model.num_hidden_layers)]
    layers = layers if forward else layers[::-1]
    ahead = [*layers[prefetch:], *[None] * prefetch] if prefetch else [None] * len(layers)
    behind = [None] * len(layers) if forward else [None, *layers]
    return Counter(LayerPlace(*one) for one in zip(layers, ahead, behind, strict=False))


def queued_forward(piece: LayerPiece, sent: dict[LayerKind, Sendings], place: LayerPlace) -> float:
    """Seconds of a layer's forward, at least."""
    return _chain(piece.ahead, sent[place.ahead].gathered if place.ahead else ())


def queued_backward(
    piece: LayerPiece, sent: dict[LayerKind, Sendings], place: LayerPlace, gathers: bool
) -> float:
    """Seconds of a layer's backward, at least. gathers: whether weights are gathered for it."""
    recomputed, experts = piece.starts[1:] if len(piece.starts) > 2 else (-1, -1)
    ahead = sent[place.ahead].gathered if place.ahead and gathers else ()
    before = sent[place.behind].dense if place.behind else ()
    return _chain(piece.back, ahead, before, recomputed, sent[place.kind].routed, experts)


def _chain(
    pass_: Priced, ahead: Sent, before: Sent = (), awaited: int = -1, routed: Sent = (), experts: int = -1
) -> float:
    """Seconds of a pass from the end of the one before to its own on the compute stream. ahead, before: sent
    as it begins, what is reduced `before` first, which it waits for at place `awaited`; routed: sent at place
    `experts`."""
    flow, moved, latest = Flow(), list[int](), 0

    def add(stream: int, took: float, deps: Sequence[int]) -> int:
        flow.add(stream, took, tuple(deps), False, FREE)
        return len(flow.streams) - 1

    add(COMPUTE, 0.0, ())
    reduced = [add(*one, (latest,)) for one in before]
    for one in ahead:
        add(*one, (latest,))
    for place, (stream, took, deps, *_) in enumerate(pass_.ops):
        if place == awaited and reduced:
            latest = add(COMPUTE, 0.0, reduced)
        if place == experts:
            for one in routed:
                add(*one, (latest,))
        moved.append(add(stream, took, [moved[dep] for dep in deps if dep >= 0]))
        latest = moved[-1] if stream == COMPUTE else latest
    return alone(flow).chain
