"""Who competes for the longest context: MoP, and FSDP2 under one restriction after the other.

The sources call their baseline the best of a sweep of FSDP2 x TP x CP x EP x optimizer offload, without the
ranges of that sweep. So each contender here states its ranges, from what TorchTitan runs out of the box to
everything that FSDP2 can be combined with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mopsim.search.space import (
    AXES,
    CHUNKED,
    DEVICE,
    EXCHANGES,
    FULL,
    HOST,
    ULYSSES,
    Axes,
    Problem,
    divisors,
)

_GATHERED = EXCHANGES.index("all_gather")
_RING = EXCHANGES.index("ring")


@dataclass(frozen=True)
class Contender:
    """One line of the figure. `rules`: its restriction in words.

    within: one sequence is split over at most this share of a node's devices (0: over any number of ranks).
    chunked: the loss may form logits slice by slice. offload: where FSDP2 may keep its state (CPU offload: on
    the host).
    """

    name: str
    label: str
    rules: str
    family: str = "fsdp2"
    within: float = 0.0
    chunked: bool = False
    offload: tuple[int, ...] = (DEVICE, HOST)

    def axes(self, problem: Problem, axes: Axes) -> Axes:
        """What is searched: a family's axes, widened to tensor and context parallelism, within the rules."""
        if self.family != "fsdp2":
            return _rings(problem, axes)
        node = problem.hardware.devices_per_node
        most = max(1, int(self.within * node)) if self.within else problem.world_size
        changed: Axes = {
            key: values
            for key, values in axes.items()
            if key not in ("sequence", "dense_shard", ("loss", "loss_slices"), ("offload", "state"))
        }
        changed["tensor", "dense_shard", "exchange", "sequence"] = [
            (tensor, shard, exchange, sequence)
            for tensor, shard in _tensor(problem)
            for exchange, sequence in self._sequences(problem)
            if tensor * sequence <= most
        ]
        losses = axes["loss", "loss_slices"]
        changed["loss", "loss_slices"] = _only(losses, 0, (FULL, CHUNKED) if self.chunked else (FULL,))
        changed["offload", "state"] = _only(axes["offload", "state"], 1, self.offload)
        return changed

    def contains(self, other: "Contender") -> bool:
        """Whether all that `other` may do is allowed here."""
        return (
            self.family == other.family
            and (not self.within or 0 < other.within <= self.within)
            and (self.chunked or not other.chunked)
            and set(other.offload) <= set(self.offload)
        )

    def _sequences(self, problem: Problem) -> list[tuple[int, int]]:
        """(exchange, degree) of context parallelism; one rank needs no exchange."""
        found = [(ULYSSES, 1)]
        for degree in divisors(problem.world_size)[1:]:
            if problem.training.seq_len % degree == 0:
                found += [(way, degree) for way in (ULYSSES, _RING, _GATHERED)]
        return found

    def at_once(self, problem: Problem, axes: Axes) -> Axes:
        """As `axes`, of which only what trains the global batch in one microbatch of one sequence a group."""
        wanted = problem.world_size // problem.training.global_batch
        changed = {**self.axes(problem, axes), "micro_batch": [1]}
        key, values = _splitting(changed)
        changed[key] = [value for value in values if _split(key, value) == wanted]  # type: ignore[assignment]
        return changed

    def most_split(self, problem: Problem) -> int:
        """Ranks that can share one sequence."""
        key, values = _splitting(self.axes(problem, AXES[self.family](problem)))
        heads, found = problem.model.num_attention_heads, [1]
        for value in values:
            split, row = _split(key, value), _row(key, value)
            legal = row.get("exchange", ULYSSES) != ULYSSES or heads % split == 0
            if legal and problem.world_size % split == 0:
                found.append(split)
        return max(found)


Key = str | tuple[str, ...]
Value = int | tuple[int, ...]


def _splitting(axes: Axes) -> tuple[Key, Sequence[Value]]:
    """The axis that says how many ranks share a sequence."""
    return next((key, values) for key, values in axes.items() if "sequence" in _names(key))


def _names(key: Key) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else key


def _row(key: Key, value: Value) -> dict[str, int]:
    return dict(zip(_names(key), value if isinstance(value, tuple) else (value,), strict=True))


def _split(key: Key, value: Value) -> int:
    row = _row(key, value)
    return row["sequence"] * row.get("tensor", 1)


def _rings(problem: Problem, axes: Axes) -> Axes:
    """MoP with the rings of the sources (a node) or over all ranks."""
    rings = {1, problem.hardware.devices_per_node, problem.world_size}
    return {**axes, "vocabulary": [degree for degree in axes["vocabulary"] if degree in rings]}


def _tensor(problem: Problem) -> list[tuple[int, int]]:
    """(tensor degree within a node, ranks that share one copy of the rest)."""
    node, world = problem.hardware.devices_per_node, problem.world_size
    heads = problem.model.num_attention_heads
    return sorted(
        {
            (tensor, ranks // tensor)
            for tensor in divisors(node)
            for ranks in (world, node)
            if heads % tensor == 0 and world % ranks == 0
        }
    )


def _only(pairs: Sequence[object], place: int, allowed: Sequence[int]) -> list[tuple[int, ...]]:
    """The pairs with one of the allowed values at a place."""
    return [pair for pair in pairs if isinstance(pair, tuple) and pair[place] in allowed]


CONTENDERS = (
    Contender(
        "mop", "MoP", "D by Ulysses, any Ep, rings over a node or all ranks, all four operators", "mop"
    ),
    Contender(
        "fsdp2",
        "FSDP2, chunked loss, any CP",
        "any TP x CP (Ulysses, ring or all-gather) over all ranks, loss in chunks, CPU offload",
        chunked=True,
    ),
    Contender(
        "fsdp2_node_chunked",
        "FSDP2, chunked loss, CP in a node",
        "loss in chunks and CPU offload, but one sequence stays in a node (TP x CP <= 8)",
        within=1.0,
        chunked=True,
    ),
    Contender(
        "fsdp2_full", "FSDP2, full logits", "any TP x CP and CPU offload, but all logits of a rank at once"
    ),
    Contender(
        "fsdp2_node",
        "FSDP2, full logits, CP in a node",
        "all logits at once, and one sequence stays in a node (TP x CP <= 8); CPU offload",
        within=1.0,
    ),
    Contender(
        "fsdp2_half_node",
        "FSDP2, full logits, CP in half a node",
        "all logits at once, and TP x CP <= 4; CPU offload",
        within=0.5,
    ),
    Contender(
        "fsdp2_device",
        "FSDP2, full logits, no offload",
        "all logits at once, any TP x CP, and nothing on the host",
        offload=(DEVICE,),
    ),
)
"""From the freest to the most restricted."""

OFFLOADED = Contender(
    "fsdp2_offloaded", "FSDP2, full logits, all on the host", "CPU offload always, all logits at once",
    offload=(HOST,),
)  # fmt: skip
"""Beside the published points only: what CPU offload costs where a step is one sequence."""
