"""Optimizer states sharded over the ranks that hold the same weights (ZeRO-1, arXiv 1910.02054), as in a
distributed optimizer: parameters and gradients are views of flat buffers, each rank updates its part of them.

Gradients of all microbatches are added up in their buffer, in its dtype; at the end of a step the ranks'
sums are reduced and scattered, and updated parameters gathered, once for each buffer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor, nn

from mopexec.distributed import collectives
from mopexec.distributed.mesh import Group, Mesh
from mopexec.distributed.tiers import Platform
from mopexec.measure.scope import category, mark_passing
from mopexec.modules.network import RankNetwork
from mopexec.modules.slices import Block, Kind, pieces
from mopexec.operators.adamw import Intervals, decays
from mopexec.operators.dtypes import of_name
from mopexec.operators.grouped import BLOCK
from mopexec.run.shards import ParameterPieces
from mopsim.spec import layout
from mopsim.spec.strategy import Precision


@dataclass(frozen=True)
class Buffer:
    """Parameters that the same ranks hold. values, grads: flat, padded to equal shards; places: where each
    parameter begins. before: ranks that hold the parameters too, whose gradients are added first (None:
    none); shard: those that share one copy of the state; replicas: those with the same part of it. trained:
    whether a loss reaches the parameters, which else stay as they are.
    """

    kind: Kind
    trained: bool
    blocks: dict[str, Block]
    places: dict[str, int]
    values: Tensor
    grads: Tensor
    before: Group | None
    shard: Group
    replicas: Group

    @property
    def key(self) -> str:
        """Names the buffer among those of a rank."""
        return self.kind if self.trained else f"{self.kind}, not trained"

    @property
    def copies(self) -> int:
        """Ranks that hold the very elements of this rank's part."""
        return self.replicas.size * (self.before.size if self.before else 1)

    @property
    def undecayed(self) -> Intervals:
        """What of this rank's part has no weight decay."""
        size = self.values.numel() // self.shard.size
        first, found = self.shard.place * size, []
        for name, block in self.blocks.items():
            low, numel = self.places[name] - first, torch.Size(block.size).numel()
            if not decays(name) and max(low, 0) < min(low + numel, size):
                found.append((max(low, 0), min(low + numel, size)))
        return sorted(found)

    def part(self, flat: Tensor) -> Tensor:
        """This rank's part of a flat buffer."""
        size = flat.numel() // self.shard.size
        return flat.narrow(0, self.shard.place * size, size)

    def fill(self, name: str, at: int, given: Tensor, part: Tensor) -> None:
        """Elements of a parameter from `at` on become `given`, in the parameter and, where this rank has
        them, in `part`, which is laid out as `part(values)`.
        """
        given, begin, first = given.reshape(-1), self.places[name] + at, self.shard.place * part.numel()
        self.values.narrow(0, begin, given.numel()).copy_(given)
        low, high = max(begin, first), min(begin + given.numel(), first + part.numel())
        if low < high:
            part[low - first : high - first].copy_(given[low - begin : high - begin])

    def view(self, flat: Tensor, name: str) -> Tensor:
        """A parameter's elements of a flat buffer."""
        shape = self.blocks[name].size
        return flat.narrow(0, self.places[name], torch.Size(shape).numel()).view(shape)

    def pieces(self, name: str, part: Tensor) -> ParameterPieces:
        """What `part` (laid out as `part(values)`) has of a parameter, as pieces of the whole one."""
        block, size, begin = self.blocks[name], part.numel(), self.places[name]
        first = self.shard.place * size
        start, stop = max(first, begin), min(first + size, begin + torch.Size(block.size).numel())
        count = max(0, stop - start)
        mine = part.narrow(0, start - first if count else 0, count)
        return pieces(block, mine, start - begin)


@dataclass
class Buffers:
    """The buffers of a rank."""

    all: list[Buffer] = field(default_factory=list)

    def named(self) -> Iterator[tuple[str, Buffer]]:
        """Every parameter with its buffer."""
        return ((name, buffer) for buffer in self.all for name in buffer.blocks)

    def reduce(self) -> None:
        """Sum gradients over the ranks that hold the same weights; each rank's part is whole after."""
        for buffer in self.all:
            if buffer.before is not None and buffer.before.size > 1:
                collectives.all_reduce(buffer.grads, buffer.before.handle)
            mine = buffer.part(buffer.grads)
            if buffer.shard.size > 1:
                collectives.reduce_scatter_single(mine, buffer.grads, buffer.shard.handle)
            if buffer.replicas.size > 1:
                collectives.all_reduce(mine, buffer.replicas.handle)

    def gather(self) -> None:
        """Bring updated parameters back from the parts."""
        for buffer in self.all:
            if buffer.shard.size > 1:
                collectives.all_gather_single(buffer.values, buffer.part(buffer.values), buffer.shard.handle)


def buffers_of(network: RankNetwork, precision: Precision, mesh: Mesh, platform: Platform) -> Buffers:
    """Buffers for a rank's part of the network, not filled."""
    of_kind: dict[Kind, tuple[Group | None, Group, Group]] = {
        "split": (None, mesh.dense_shard, mesh.dense_replicas),
        "whole": (mesh.tensor, mesh.dense_shard, mesh.dense_replicas),
        "experts": (None, mesh.expert_shard, mesh.expert_replicas),
    }
    found, unreached = Buffers(), set(network.model.unreached())
    for trained, (kind, of) in product((True, False), of_kind.items()):
        mine = {
            name: block
            for name, block in network.blocks.items()
            if block.kind == kind and (name not in unreached) == trained
        }
        if mine:
            dtypes = (of_name(precision.param), of_name(precision.grad))
            found.all.append(make_buffer(kind, mine, of, dtypes, platform, trained=trained))
    return found


def make_buffer(
    kind: Kind, blocks: Mapping[str, Block], groups: tuple[Group | None, Group, Group],
    dtypes: tuple[torch.dtype, torch.dtype], platform: Platform, *, trained: bool,
) -> Buffer:  # fmt: skip
    """A buffer for parameters. groups: before, shard, replicas; dtypes: of parameters and of gradients."""
    places, end = {}, 0
    for name, block in blocks.items():
        places[name] = end
        end += layout.ceil_div(torch.Size(block.size).numel(), BLOCK) * BLOCK
    size = layout.ceil_div(end, groups[1].size * BLOCK) * groups[1].size * BLOCK
    with category("params"):
        values = torch.zeros(size, dtype=dtypes[0], device=platform.device)
    with category("grads"):
        grads = torch.zeros(size, dtype=dtypes[1], device=platform.device)
    return Buffer(kind, trained, dict(blocks), places, values, grads, *groups)


def adopt(model: nn.Module, buffers: Sequence[Buffer]) -> None:
    """Make the model's parameters views of the buffers; their gradients are added up there."""
    for buffer in buffers:
        for name in buffer.blocks:
            parameter = nn.Parameter(buffer.view(buffer.values, name))
            mark_passing(parameter)
            grad = buffer.view(buffer.grads, name)
            if grad.dtype == parameter.dtype:
                parameter.grad = grad
            else:
                parameter.register_post_accumulate_grad_hook(_adding_to(grad))  # type: ignore[no-untyped-call]
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, parameter)


def _adding_to(total: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds a parameter's gradient to `total`, in its dtype, and frees it."""

    def add(parameter: Tensor) -> None:
        if parameter.grad is not None:  # it is put off else (`mopexec.operators.put_off`)
            total.add_(parameter.grad)
            parameter.grad = None

    return add
