"""Pipeline parallelism: a stage's microbatches in the schedule's order (1F1B, arXiv 2006.09503; interleaved,
arXiv 2104.04473), activations and gradients sent between neighbours.

Every neighbour has a group of its own for each direction, so that no send waits behind a receive.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mopexec.distributed import collectives
from mopexec.distributed.collectives import Waitable
from mopexec.distributed.tiers import Platform
from mopexec.measure.scope import category, phase
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
        self.found: dict[tuple[str, str], Link] = {}
        for way in ("forward", "backward"):
            for first in range(world if ranks < world else 0):
                second = (first + ranks) % world
                group = dist.new_group([first, second], backend=platform.backend)
                source, target = (first, second) if way == "forward" else (second, first)
                if me == source:
                    self.found[way, "to"] = Link(target, group)
                if me == target:
                    self.found[way, "from"] = Link(source, group)


class StagePipeline:
    """This rank's stage. shape, dtype: of what travels between stages."""

    def __init__(
        self, strategy: Strategy, links: Links, shape: tuple[int, ...], dtype: torch.dtype, platform: Platform
    ) -> None:
        self._how, self._links, self._platform = strategy.pipeline, links, platform
        self._stage = layout.place(strategy, dist.get_rank()).stage
        self._shape, self._dtype = shape, dtype
        self._sent: dict[tuple[str, int, int], tuple[Waitable, Tensor]] = {}

    def step(self, microbatches: int, part: Part) -> Iterator[Tensor]:
        """Forward and backward of every microbatch; gives the losses of the last stage."""
        how = self._how
        slots = pipeline_order.order(
            how.schedule, how.pipeline_parallel, how.virtual_stages, microbatches, self._stage
        )
        kept: dict[tuple[int, int], tuple[Tensor | None, Tensor | GradientEdge]] = {}
        for kind, microbatch, chunk in slots:
            if kind == "forward":
                with phase("forward"):
                    x, out = self._forward(microbatch, chunk, part)
                if self.last(chunk):
                    yield out.detach()
                kept[microbatch, chunk] = x, out if self.last(chunk) else get_gradient_edge(out)
                del x, out
            else:
                with phase("backward"):
                    self._backward(microbatch, chunk, *kept.pop((microbatch, chunk)))
        self._sent_all()

    @torch.no_grad()
    def evaluate(self, microbatches: int, part: Part) -> Iterator[Tensor]:
        """The losses of the last stage, without gradients."""
        for microbatch in range(microbatches):
            for chunk in range(self._how.virtual_stages):
                _, out = self._forward(microbatch, chunk, part)
                if self.last(chunk):
                    yield out
        self._sent_all()

    def first(self, chunk: int) -> bool:
        """Whether the stage's part is the network's first."""
        return self._stage == 0 and chunk == 0

    def last(self, chunk: int) -> bool:
        """Whether the stage's part is the network's last."""
        return self._stage == self._how.pipeline_parallel - 1 and chunk == self._how.virtual_stages - 1

    def _forward(self, microbatch: int, chunk: int, part: Part) -> tuple[Tensor | None, Tensor]:
        """What arrived, and what was made of it and sent on."""
        x = None if self.first(chunk) else self._receive("forward")
        if x is not None and torch.is_grad_enabled():
            x.requires_grad_()
        out = part(microbatch, chunk, x)
        if not self.last(chunk):
            self._send("forward", microbatch, chunk, out.detach())
        return x, out

    def _backward(self, microbatch: int, chunk: int, x: Tensor | None, out: Tensor | GradientEdge) -> None:
        given = None
        if not self.last(chunk):
            given = self._receive("backward")
            self._over("forward", microbatch, chunk)  # its gradient is here, so it has arrived
        torch.autograd.backward(out, given)
        if x is not None:
            assert x.grad is not None
            if self._how.virtual_stages == 1 and microbatch:
                self._over("backward", microbatch - 1, chunk)
            self._send("backward", microbatch, chunk, x.grad)

    def _receive(self, way: str) -> Tensor:
        link = self._links.found[way, "from"]
        with category("boundaries"):
            x = torch.empty(self._shape, dtype=self._dtype, device=self._platform.device)
        collectives.send_recv([], link.rank, [x], link.rank, link.group, timed=False)
        return x

    def _send(self, way: str, microbatch: int, chunk: int, x: Tensor) -> None:
        link, x = self._links.found[way, "to"], x.contiguous()
        work = collectives.send_recv([x], link.rank, [], link.rank, link.group, async_op=True, timed=False)
        self._sent[way, microbatch, chunk] = work, x

    def _over(self, way: str, microbatch: int, chunk: int) -> None:
        self._sent.pop((way, microbatch, chunk))[0].wait()

    def _sent_all(self) -> None:
        for work, _ in self._sent.values():
            work.wait()
        self._sent.clear()
