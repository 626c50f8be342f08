"""Pipeline parallelism: a stage's microbatches in the schedule's order (1F1B, arXiv 2006.09503; interleaved,
arXiv 2104.04473; zero bubble, arXiv 2401.10241), activations and gradients sent between neighbours.

Every neighbour has a group of its own for each direction, so that no send waits behind a receive.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mopexec.distributed import collectives
from mopexec.distributed.collectives import Waitable
from mopexec.distributed.mesh import own_group, rounds
from mopexec.distributed.tiers import Platform
from mopexec.measure.scope import category, phase
from mopexec.operators.put_off import PutOff, planned
from mopsim.spec import layout, pipeline_order
from mopsim.spec.strategy import Strategy

Part = Callable[[int, int, Tensor | None], Tensor]
"""(microbatch, part of the stage, what arrived or None in the network's first part) to what the part makes:
hidden states, or the loss in the last one."""


@dataclass(frozen=True)
class Link:
    """The way to or from a neighbour: its global rank, and the group of the two for one direction."""

    rank: int
    group: dist.ProcessGroup | None


class Links:
    """Of this rank: forward and backward, to and from the stages after and before it."""

    def __init__(self, strategy: Strategy, platform: Platform) -> None:
        """Collective over all ranks: every rank makes the same groups in the same order."""
        me, ranks, world = dist.get_rank(), strategy.stage_ranks, strategy.world_size
        pairs = [(first, (first + ranks) % world) for first in range(world if ranks < world else 0)]
        self.found: dict[tuple[str, str], Link] = {}
        for way in ("forward", "backward"):
            for groups in rounds(pairs, world):
                group = own_group(groups, me, platform)
                for first, second in (pair for pair in groups if len(pair) == 2 and me in pair):
                    source, target = (first, second) if way == "forward" else (second, first)
                    end, other = ("to", target) if me == source else ("from", source)
                    self.found[way, end] = Link(other, group)


class StagePipeline:
    """This rank's stage. shape, dtype: of what travels between stages.

    A turn of the schedule takes what it needs from neighbours, waits for what the turn before sent, computes
    and sends: at most one turn's messages are held. Of an interleaved schedule a forward and the backward
    after it are one turn, as what crosses would otherwise wait for each other; `StageStep` plays the same.
    """

    def __init__(
        self, strategy: Strategy, links: Links, shape: tuple[int, ...], dtype: torch.dtype, platform: Platform
    ) -> None:
        self._how, self._links, self._platform = strategy.pipeline, links, platform
        self._stage = layout.place(strategy, dist.get_rank()).stage
        self._shape, self._dtype = shape, dtype
        self._sent: list[tuple[Waitable, Tensor]] = []
        self._kept: dict[tuple[int, int], _Ends] = {}
        self._left: dict[tuple[int, int], PutOff] = {}
        self._forwards: type[AbstractContextManager[Any]] = planned if self._how.splits else nullcontext

    def step(self, microbatches: int, part: Part) -> Iterator[Tensor]:
        """Forward and backward of every microbatch; gives the losses of the last stage."""
        how = self._how
        for turn in pipeline_order.turns(
            how.schedule, how.pipeline_parallel, how.virtual_stages, microbatches, self._stage
        ):
            if turn[0][0] == "weight_grad":  # nothing comes or goes
                self._weights(*turn[0][1:])
                continue
            given = [self._needed(kind, chunk) for kind, _, chunk in turn]
            self._all_sent()
            made: list[tuple[str, Tensor]] = []
            for kind, microbatch, chunk in turn:
                if kind != "forward":
                    with phase("backward"):
                        made += [("backward", one) for one in self._backward(kind, microbatch, chunk, given)]
                    continue
                with phase("forward"), self._forwards():
                    out = self._forward(microbatch, chunk, given, part)
                if self.last(chunk):
                    yield out
                else:
                    made.append(("forward", out))
                del out
            while made:
                self._send(*made.pop(0))
        self._all_sent()

    @torch.no_grad()
    def evaluate(self, microbatches: int, part: Part) -> Iterator[Tensor]:
        """The losses of the last stage, without gradients."""
        for microbatch in range(microbatches):
            for chunk in range(self._how.virtual_stages):
                x = self._needed("forward", chunk)
                self._all_sent()
                out = part(microbatch, chunk, x)
                if self.last(chunk):
                    yield out
                else:
                    self._send("forward", out)
        self._all_sent()

    def first(self, chunk: int) -> bool:
        """Whether the stage's part is the network's first."""
        return self._stage == 0 and chunk == 0

    def last(self, chunk: int) -> bool:
        """Whether the stage's part is the network's last."""
        return self._stage == self._how.pipeline_parallel - 1 and chunk == self._how.virtual_stages - 1

    def _needed(self, kind: str, chunk: int) -> Tensor | None:
        """What a pass takes from a neighbour. kind: forward or backward."""
        way = "forward" if kind == "forward" else "backward"
        if self.first(chunk) if way == "forward" else self.last(chunk):
            return None
        with phase(way):
            return self._receive(way)

    def _forward(self, microbatch: int, chunk: int, given: list[Tensor | None], part: Part) -> Tensor:
        """What a part makes of the first of `given`, which dies where the part is done with it."""
        ends = self._kept[microbatch, chunk] = _Ends()
        out = part(microbatch, chunk, ends.begin(given))
        ends.end(out, whole=self.last(chunk))
        return out.detach()

    def _backward(self, kind: str, microbatch: int, chunk: int, given: list[Tensor | None]) -> list[Tensor]:
        """Takes the gradient of what the part made from `given`; that of what arrived, if something did."""
        ends = self._kept.pop((microbatch, chunk))
        ends.out.append(given.pop(0))
        assert ends.root is not None
        half: AbstractContextManager[Any] = nullcontext()
        if kind == "input_grad":
            half = self._left[microbatch, chunk] = PutOff()
        with half:
            torch.autograd.backward(ends.root)
        return ends.arrived

    def _weights(self, microbatch: int, chunk: int) -> None:
        """What a backward has put off."""
        with phase("backward"):
            self._left.pop((microbatch, chunk)).make()

    def _receive(self, way: str) -> Tensor:
        link = self._links.found[way, "from"]
        with category("boundaries"):
            x = torch.empty(self._shape, dtype=self._dtype, device=self._platform.device)
        collectives.send_recv([], link.rank, [x], link.rank, link.group, timed=False)
        return x

    def _send(self, way: str, x: Tensor) -> None:
        link, x = self._links.found[way, "to"], x.contiguous()
        work = collectives.send_recv([x], link.rank, [], link.rank, link.group, async_op=True, timed=False)
        self._sent.append((work, x))

    def _all_sent(self) -> None:
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()


class _Ends:
    """Both ends of a part's graph, which keeps neither what arrived nor, in the backward, the gradient that
    it starts from. arrived: the gradient of what arrived; out: that of what the part made; root: where the
    backward starts."""

    def __init__(self) -> None:
        self.arrived: list[Tensor] = []
        self.out: list[Tensor | None] = []
        self.root: Tensor | None = None

    def begin(self, given: list[Tensor | None]) -> Tensor | None:
        """The first of `given`."""
        x = given.pop(0)
        if x is None:
            return None
        start = torch.empty(0, device=x.device, requires_grad=True)
        return cast(Tensor, _Begin.apply(start, x, self.arrived))  # type: ignore[no-untyped-call]

    def end(self, made: Tensor, *, whole: bool) -> None:
        """whole: it is the loss."""
        self.root = made if whole else _End.apply(made, self.out)  # type: ignore[no-untyped-call]


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, start: Tensor, x: Tensor, arrived: list[Tensor]) -> Tensor:
        ctx.arrived = arrived
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.arrived.append(grads[0])
        return None, None, None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, made: Tensor, out: list[Tensor]) -> Tensor:
        ctx.out = out
        return made.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.out.pop(), None
