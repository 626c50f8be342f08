"""Who competes for the longest context: MoP, and FSDP2 under one restriction after the other.

The sources call their baseline the best of a sweep of FSDP2 x TP x CP x EP x optimizer offload, without the
ranges of that sweep. So each contender here states its ranges, from what a trainer runs out of the box to
everything that FSDP2 can be combined with (contenders.yaml).
"""

from collections.abc import Sequence
from typing import Literal

from mopsim.common.io import Spec
from mopsim.common.shipped import listed_in
from mopsim.search.axes import within
from mopsim.search.had import Key, Value, axes_of, columns_of, exchanges, names
from mopsim.search.problem import CHUNKED, DEVICE, FULL, HOST, ULYSSES, Axes, Problem, divisors
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import load_stack
from mopsim.strategies import STACKS

_TIERS = {"device": DEVICE, "host": HOST}
_NOT_SWEPT = {"pipeline": 1, "expert_tensor": 1, "modules": 0, "saved": 0}
"""Columns of FSDP2's space that no source's sweep varies."""


class Contender(Spec, frozen=True, kw_only=True):
    """One line of a sweep: see contenders.yaml. rules: its restriction in words."""

    name: str
    label: str
    rules: str
    family: str
    stack: str = ""
    always: bool = False
    rings: bool = False
    within: float = 0.0
    chunked: bool = False
    offload: tuple[Literal["device", "host"], ...] = ("device", "host")

    @property
    def software(self) -> Stack | None:
        """Of its candidates; None where it is the family's own."""
        return load_stack(self.stack) if self.stack else None

    @property
    def runs_on(self) -> str:
        """Name of the stack of its candidates."""
        return self.stack or STACKS[self.family]

    @property
    def assumed(self) -> bool:
        """Whether what its stack can do is an assumption, so that no one program is known to be it."""
        sources = load_stack(self.runs_on).sources.values()
        return any(source.startswith("an assumption") for source in sources)

    def axes(self, problem: Problem, axes: Axes) -> Axes:
        """What is searched: a family's axes, widened to tensor and context parallelism, within the rules."""
        if self.rings:
            return _rings(problem, axes)
        node = problem.hardware.devices_per_node
        most = max(1, int(self.within * node)) if self.within else problem.world_size
        changed: Axes = {
            key: values
            for key, values in within(axes, _NOT_SWEPT).items()
            if key not in ("tensor", ("sequence", "exchange"))
        }
        changed["tensor", "exchange", "sequence"] = [
            (tensor, exchange, sequence)
            for tensor in _tensor(problem)
            for exchange, sequence in self._sequences(problem)
            if tensor * sequence <= most
        ]
        losses = axes["loss", "loss_slices"]
        changed["loss", "loss_slices"] = _only(losses, 0, (FULL, CHUNKED) if self.chunked else (FULL,))
        changed["offload", "state"] = _only(
            axes["offload", "state"], 1, [_TIERS[tier] for tier in self.offload]
        )
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
                found += [(way, degree) for way in exchanges(problem, self.family)]
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
        key, values = _splitting(self.axes(problem, axes_of(problem, self.family)))
        heads, found = problem.model.num_split_heads, [1]
        for value in values:
            split, row = _split(key, value), columns_of(key, value)
            legal = row.get("exchange", ULYSSES) != ULYSSES or heads % split == 0
            if legal and problem.world_size % split == 0:
                found.append(split)
        return max(found)


def _splitting(axes: Axes) -> tuple[Key, Sequence[Value]]:
    """The axis that says how many ranks share a sequence."""
    return next((key, values) for key, values in axes.items() if "sequence" in names(key))


def _split(key: Key, value: Value) -> int:
    row = columns_of(key, value)
    return row["sequence"] * row.get("tensor", 1)


def _rings(problem: Problem, axes: Axes) -> Axes:
    """MoP with the rings of the sources (a node) or over all ranks."""
    rings = {1, problem.hardware.devices_per_node, problem.world_size}
    return {**axes, "vocabulary": [degree for degree in axes["vocabulary"] if degree in rings]}


def _tensor(problem: Problem) -> list[int]:
    """Tensor degrees within a node."""
    heads = problem.model.num_split_heads
    return [d for d in divisors(problem.hardware.devices_per_node) if heads % d == 0]


def _only(pairs: Sequence[object], place: int, allowed: Sequence[int]) -> list[tuple[int, ...]]:
    """The pairs with one of the allowed values at a place."""
    return [pair for pair in pairs if isinstance(pair, tuple) and pair[place] in allowed]


contenders = listed_in("mopsim.context", Contender, "contenders.yaml")
"""Those of contenders.yaml, from the freest to the most restricted."""
