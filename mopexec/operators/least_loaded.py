"""Least-loaded experts (LLEP, arXiv 2601.17111) under chunked dispatch (PipelinedLLEP, arXiv 2609.14306).

The published rule (`mopsim.spec.placement`) places the rows of a layer's experts over the ranks of their
group, from the counts that the dispatch exchanges anyway; every rank makes the same plan. Each chunk gives a
rank the same part of an expert's rows. Ranks that compute rows of others' experts get those experts' weights
before the rows; what the gradients of these weights add up to goes home once a layer. An empty plan is plain
dispatch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mopexec.distributed import collectives
from mopexec.distributed.mesh import Group
from mopexec.distributed.tiers import Platform
from mopexec.measure.tracker import category, component, phase
from mopsim.spec.placement import Placement, least_loaded
from mopsim.spec.strategy import Experts

Counts = Sequence[Sequence[Sequence[int]]]
"""counts[r][i][e]: routes of chunk i from rank r of the group to expert e."""
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Moves:
    """Of one layer. All ranks have as many places for experts: their own, then those that come, the rest
    empty; place s of rank t, of n places, is destination t * n + s.

    received: (expert, place of its owner in the group) of each that comes; sent: (expert, place of the rank
    that needs it) of each of this rank's. destinations [n], lengths [n]: runs of this rank's routes, sorted
    by chunk and expert; the destinations of a chunk follow those of the one before.
    """

    received: tuple[tuple[int, int], ...]
    sent: tuple[tuple[int, int], ...]
    destinations: Tensor
    lengths: Tensor

    def order(self, by_expert: Tensor) -> Tensor:
        """Routes by chunk and destination, from those by chunk and expert."""
        runs = torch.repeat_interleave(self.destinations, self.lengths, output_size=by_expert.shape[0])
        return by_expert.index_select(0, runs.argsort(stable=True))


Counted = tuple[list[list[int]], list[list[list[int]]], Tensor, Moves | None]
"""send, receive, arrived and moves of `Routes`."""


def placed(counts: Counts, group: Group, how: Experts, platform: Platform) -> Counted | None:
    """What `Routes` has, by destination; None where nothing moves."""
    size, chunks, experts = group.size, len(counts[0]), len(counts[0][0])
    totals = [sum(counts[r][i][e] for r in range(size) for i in range(chunks)) for e in range(experts)]
    placement = least_loaded(totals, size, how.capacity, how.min_rows, how.threshold)
    if not placement.moves:
        return None
    local, place = experts // size, group.place
    slot = _slots(placement, local, size)
    slots = 1 + max(s for _, s in slot.values())
    targets = [[r for r in range(size) if e in placement.rows[r]] for e in range(experts)]
    rest = [[placement.rows[r][e] for r in targets[e]] for e in range(experts)]
    send = [[0] * (size * slots) for _ in range(chunks)]
    receive = [[[0] * slots for _ in range(size)] for _ in range(chunks)]
    destinations: list[int] = []
    lengths: list[int] = []
    for i in range(chunks):
        for e in range(experts):
            from_ranks = [counts[r][i][e] for r in range(size)]
            quota = _part(sum(from_ranks), rest[e])
            rest[e] = [left - now for left, now in zip(rest[e], quota, strict=True)]
            shared = _overlaps(from_ranks, quota)
            for index, target in enumerate(targets[e]):
                _, s = slot[target, e]
                destinations.append((i * size + target) * slots + s)
                lengths.append(shared[place][index])
                send[i][target * slots + s] = shared[place][index]
                if target == place:
                    for r in range(size):
                        receive[i][r][s] = shared[r][index]
    with category("activations"):
        arrived = platform.upload(receive, (chunks, size, slots))
        where, long = platform.upload((destinations, lengths), (2, len(lengths))).unbind(0)
    received = tuple((e, owner) for e, owner, target in placement.moves if target == place)
    sent = tuple((e, target) for e, owner, target in placement.moves if owner == place)
    return send, receive, arrived, Moves(received, sent, where, long)


def _slots(placement: Placement, local: int, size: int) -> dict[tuple[int, int], tuple[int, int]]:
    """(rank, slot) of each expert at each rank that may compute rows of it, by (rank, expert)."""
    found = {(e // local, e): (e // local, e % local) for e in range(local * size)}
    held = [local] * size
    for expert, _, target in placement.moves:
        found[target, expert] = (target, held[target])
        held[target] += 1
    return found


def _part(rows: int, rest: Sequence[int]) -> list[int]:
    """`rows` of a chunk over the ranks that have `rest` still to come, in proportion, none more than that."""
    total, before, cut, found = sum(rest), 0, 0, []
    for left in rest:
        before += left
        following = rows * before // total if total else 0
        found.append(following - cut)
        cut = following
    return found


def _overlaps(given: Sequence[int], taken: Sequence[int]) -> list[list[int]]:
    """Rows that giver g sends to taker t, both lined up in order: found[g][t]."""
    found, start = [], 0
    for rows in given:
        begin, row = 0, []
        for quota in taken:
            row.append(max(0, min(start + rows, begin + quota) - max(start, begin)))
            begin += quota
        found.append(row)
        start += rows
    return found


class Foreign:
    """Weights of others' experts that a rank computes with in one pass of a layer, and their gradients: rows
    of one buffer, an expert each, flat.

    own [experts, n]: this rank's experts, from expert `first` on. views: the parameters of flat experts
    [m, n], as a stack. grad_dtype: of the gradients.
    """

    def __init__(
        self, own: Tensor, first: int, views: Callable[[Tensor], Weights], group: Group, moves: Moves,
        grad_dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.first, self.views, self.group, self.moves = first, views, group, moves
        self._grad_dtype = grad_dtype
        self._grads: Tensor | None = None
        with component("experts"), category("gathered"):
            self._weights = own.new_empty(len(moves.received), own.shape[1])
        self._coming: collectives.Waitable | None = self._exchange(
            [(own[expert - first], expert, to) for expert, to in moves.sent],
            [
                (row, expert, owner)
                for row, (expert, owner) in zip(self._weights, moves.received, strict=True)
            ],
        )

    def weights(self) -> list[Weights]:
        """The experts' parameters, there by now, as one more stack; none where no expert comes."""
        if self._coming is not None:
            self._coming.wait()
            self._coming = None
        return [self.views(self._weights)] if self.moves.received else []

    def open_grads(self) -> list[Weights]:
        """Zeroed gradients, as `weights`."""
        with category("gathered_grads"):
            self._grads = torch.zeros_like(self._weights, dtype=self._grad_dtype)
        return [self.views(self._grads)] if self.moves.received else []

    def send_home(self, grads: Tensor) -> None:
        """Gradients of the experts go to their owners; grads [experts, n], of this rank's own, += those that
        come."""
        with component("experts"), phase("backward"):
            mine = self._grads
            assert mine is not None, "gradients were not opened"
            with category("gathered_grads"):
                arriving = mine.new_empty(len(self.moves.sent), mine.shape[1])
            self._exchange(
                [(row, e, owner) for row, (e, owner) in zip(mine, self.moves.received, strict=True)],
                [(row, e, helper) for row, (e, helper) in zip(arriving, self.moves.sent, strict=True)],
            ).wait()
            for row, (expert, _) in zip(arriving, self.moves.sent, strict=True):
                grads[expert - self.first].add_(row)
            self._grads = None

    def _exchange(
        self, send: Sequence[tuple[Tensor, int, int]], receive: Sequence[tuple[Tensor, int, int]]
    ) -> collectives.Waitable:
        """Tensors with their experts and the peers' places in the group; the expert tells them apart."""

        def addressed(parts: Sequence[tuple[Tensor, int, int]]) -> Iterator[tuple[Tensor, int, int]]:
            return ((tensor, self.group.ranks[peer], tag) for tensor, tag, peer in parts)

        return collectives.exchange(
            list(addressed(send)), list(addressed(receive)), self.group.handle, async_op=True, timed=False
        )
