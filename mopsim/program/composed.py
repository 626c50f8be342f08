"""Composition of layers that are alike: a few of each run are played, the rest repeats those.

Once as many layers as are gathered ahead have passed, every period of a run does what the one before it did,
later by as long and at as much more memory. So a gap stands for the layers between: its time is that of the
period before it, its memory what that period left. The engine checks that the last two periods before a gap
really were alike (mopsim.engine.gaps); where they were not, the program is played whole.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from mopsim.program.context import Context

LONGEST = 8
"""Layers of a repeating pattern at most (full attention in every eighth layer)."""


@dataclass(frozen=True)
class Gap:
    """`times` periods of layers that are not played, after `lead` and before `tail`: the periods next to
    them, in the network's order."""

    lead: tuple[int, ...]
    tail: tuple[int, ...]
    times: int
    hidden: tuple[int, ...]

    def stands_for(self, phase: str) -> tuple[int, ...]:
        """The period that is played for those of the gap, which comes right before it in this phase."""
        return self.lead if phase == "forward" else self.tail

    def begins_after(self, phase: str) -> int:
        """The layer after which the gap comes."""
        return self.lead[-1] if phase == "forward" else self.tail[0]


def compose(
    layers: Sequence[int], kinds: Sequence[Hashable], ahead: int
) -> tuple[list[int], tuple[Gap, ...]]:
    """(layers to play, gaps between them). kinds: equal for layers that run alike. ahead: layers that a
    layer acts on beside itself (gathered before their turn)."""
    shown: list[int] = []
    gaps: list[Gap] = []
    place, end = 0, len(layers)
    while place < end:
        period, run = _longest(kinds, place)
        keep = period * -(-(ahead + 1 + 2 * period) // period)
        times = (run - 2 * keep) // period
        if times < 1:
            step = run if run > period else 1
            shown += layers[place : place + step]
            place += step
            continue
        lead, tail = place + keep, place + keep + times * period
        shown += layers[place:lead]
        gaps.append(
            Gap(
                tuple(layers[lead - period : lead]), tuple(layers[tail : tail + period]), times,
                tuple(layers[lead:tail]),
            )
        )  # fmt: skip
        shown += layers[tail : place + run]
        place += run
    return shown, tuple(gaps)


def _longest(kinds: Sequence[Hashable], start: int) -> tuple[int, int]:
    """(period, length) of the longest run from `start` on that repeats with a period."""
    best = (1, 1)
    for period in range(1, LONGEST + 1):
        end = start + period
        while end < len(kinds) and kinds[end] == kinds[end - period]:
            end += 1
        if end - start > max(best[1], 2 * period):
            best = (period, end - start)
    return best


def alike(context: Context, layer: int, kind: Hashable) -> Hashable:
    """What layers that run alike have in common: their operators (`kind`), the sizes of their
    parameters, where their inputs wait for the backward."""
    strategy = context.strategy
    units = tuple((u.component, u.padded, u.shard, u.shard_numel, u.group) for u in context.layers[layer])
    return kind, units, layer < context.offloaded, layer < strategy.activations.cpu_offload_layers


def composable(context: Context) -> bool:
    """Whether nothing reaches further than the layers that are gathered ahead: one stage, gradients
    reduced in every microbatch or after all of them."""
    strategy, overlap = context.strategy, context.strategy.overlap
    one = strategy.pipeline.pipeline_parallel == strategy.pipeline.virtual_stages == 1
    across = overlap.grad_reduce or overlap.param_gather or context.weaves
    return one and not across and strategy.optimizer.overlap == "none"
