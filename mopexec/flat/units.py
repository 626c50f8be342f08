"""Flat units: parameters of one gather, flattened into one buffer, padded, and sharded over a
group of ranks.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from mopexec.distributed import collectives
from mopexec.distributed.background import Signal
from mopexec.distributed.mesh import Group
from mopexec.distributed.tiers import Platform
from mopexec.measure.tracker import category, recategorize
from mopexec.model.initialize import is_stacked
from mopexec.operators.adamw import Intervals, decays
from mopexec.operators.dtypes import of_name
from mopexec.weights.source import Source
from mopsim.spec import layout
from mopsim.spec.strategy import Precision

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Contents:
    """What a unit holds, as a slice of a flat order that no sharding changes (so that checkpoints reshard).

    names: parameters in order with their shapes; `prefix` is left out of the names of their views. stack: 0,
    or the number of experts that this unit holds out of all, from `first` on: then shapes are one expert's
    and the flat order is expert by expert. rows: None, or the [start, stop) rows of the unit's only parameter
    (a vocabulary interval).
    """

    key: str
    names: tuple[tuple[str, Shape], ...]
    prefix: str = ""
    stack: int = 0
    first: int = 0
    total_stack: int = 0
    rows: tuple[int, int] | None = None

    @property
    def per_copy(self) -> int:
        """Elements of one expert, or of the whole unit."""
        return sum(math.prod(shape) for _, shape in self.names)

    @property
    def numel(self) -> int:
        """Elements of this unit, without padding."""
        if self.rows is not None:
            return (self.rows[1] - self.rows[0]) * self._width
        return self.per_copy * (self.stack or 1)

    def by_copy(self, flat: Tensor) -> Tensor:
        """A flat buffer expert by expert, [experts, per_copy]."""
        return flat[: self.numel].view(-1, self.per_copy)

    @property
    def _width(self) -> int:
        return math.prod(self.names[0][1][1:])

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The parameters as views of a flat buffer of at least `numel` elements."""
        if self.rows is not None:
            return {self.names[0][0]: flat[: self.numel].view(-1, *self.names[0][1][1:])}
        found: dict[str, Tensor] = {}
        offset = 0
        stacked = flat[: self.numel].view(self.stack or 1, self.per_copy)
        for name, shape in self.names:
            size = math.prod(shape)
            part = stacked[:, offset : offset + size]
            found[name.removeprefix(self.prefix)] = (
                part.view(self.stack, *shape) if self.stack else part.view(shape)
            )
            offset += size
        return found

    def pieces(self) -> list[tuple[str, int | None, Shape, int]]:
        """(name, index in its stack, shape, offset in the flat order) of every separately
        initialised piece.
        """
        found: list[tuple[str, int | None, Shape, int]] = []
        for copy in range(self.stack or 1):
            offset = copy * self.per_copy
            for name, shape in self.names:
                index = self.first + copy if is_stacked(name) else None
                found.append((name, index, shape, offset))
                offset += math.prod(shape)
        return found


@dataclass(frozen=True)
class Part:
    """Elements [start, start + numel) of parameter `name`, or of copy `index` of its stack, each of `shape`:
    they lie at `place` in the shard.
    """

    name: str
    index: int | None
    shape: Shape
    start: int
    place: int
    numel: int


class Unit:
    """One rank's part of a unit: resident shards of parameters and gradients, and the transient full buffers.

    gather / wait / release make the full parameters come and go (`gathered`); open_grads, reduce and
    finish_reduce those of the gradients (`gathered_grads`). With one rank to a shard nothing is copied where
    dtypes agree. updated: where the optimizer runs beside the step, what a gather waits for. transient: the
    gradient shard is there from the first reduction of a step until it is taken.
    """

    def __init__(
        self, contents: Contents, shard: Group, replicas: Group, precision: Precision, platform: Platform, *,
        transient: bool = False,
    ) -> None:  # fmt: skip
        self.contents, self.shard, self.replicas, self.platform = contents, shard, replicas, platform
        param, grad = of_name(precision.param), of_name(precision.grad)
        self.compute, self.reduce_dtype = of_name(precision.compute), of_name(precision.reduce)
        self.shard_numel = layout.shard_numel(contents.numel, shard.size)
        with category("params"):
            self.params = torch.empty(self.shard_numel, dtype=param, device=platform.device)
        self.grad_dtype, self.transient = grad, transient
        self._grads: Tensor | None = None if transient else self._zero_grads()
        self.updated: Signal | None = None
        parts = (part for part in self.parts() if not decays(part.name))
        self.undecayed: Intervals = [(part.place, part.place + part.numel) for part in parts]
        self._stale = False
        self._full: Tensor | None = None
        self._pending: tuple[collectives.Waitable, Tensor] | None = None
        self._full_grads: Tensor | None = None
        self._reducing: tuple[collectives.Waitable, Tensor, Tensor] | None = None
        self._replicating: collectives.Waitable | None = None

    def _zero_grads(self) -> Tensor:
        with category("grads"):
            return torch.zeros(self.shard_numel, dtype=self.grad_dtype, device=self.platform.device)

    @property
    def grads(self) -> Tensor:
        """The gradient shard."""
        assert self._grads is not None, f"{self.contents.key} has no gradients"
        return self._grads

    def take_grads(self) -> Tensor:
        """The gradient shard, from now on the caller's."""
        taken, self._grads = self.grads, None
        return taken

    def forget_grads(self) -> None:
        """What a loss without a step has left of gradients is in nobody's way."""
        self._full_grads = None
        if self.transient:
            self._grads = None

    def square(self, dtype: torch.dtype) -> Tensor:
        """This rank's part of the squared norm of the gradients of all ranks (0-dim)."""
        norm: Tensor = torch.linalg.vector_norm(self.grads, dtype=dtype)
        norm.square_().div_(self.replicas.size)
        return norm

    @property
    def start(self) -> int:
        """Place of this rank's shard in the unit's flat order."""
        return self.shard.place * self.shard_numel

    @property
    def first(self) -> int:
        """Place of this rank's shard in the flat order of the whole parameter whose rows the unit has."""
        rows = self.contents.rows
        return self.start + (rows[0] * self.contents._width if rows else 0)

    @property
    def valid(self) -> int:
        """Elements of the shard that are not padding."""
        return max(0, min(self.shard_numel, self.contents.numel - self.start))

    def fill(self, target: Tensor, source: Source) -> None:
        """`target`, laid out as the shard, becomes this rank's part of the source's weights."""
        target.zero_()
        for part in self.parts():
            width, stop = math.prod(part.shape[1:]), part.start + part.numel
            first, last = part.start // width, -(-stop // width)
            rows = source.read(part.name, part.shape, part.index, 0, first, last).reshape(-1)
            here = target[part.place : part.place + part.numel]
            here.copy_(rows[part.start - first * width : stop - first * width])

    def parts(self) -> Iterator["Part"]:
        """What this rank's shard holds of each piece of the unit, in order."""
        low, high = self.first, self.first + self.valid
        for name, index, shape, offset in self.contents.pieces():
            begin, end = max(low, offset), min(high, offset + math.prod(shape))
            if begin < end:
                yield Part(name, index, shape, begin - offset, begin - low, end - begin)

    def gather(self) -> None:
        """Start gathering the full parameters, unless they are there or on their way."""
        if self._full is not None:
            return
        if self.shard.size == 1:
            if self.updated is None or not self.updated.pending:
                self._full = self._cast()
            return
        with category("gathered"):
            full = torch.empty(
                self.shard_numel * self.shard.size, dtype=self.compute, device=self.platform.device
            )
        with nullcontext() if self.updated is None else self.updated.beside("gather"):
            source = self._cast()
            work = collectives.all_gather_single(full, source, self.shard.handle, async_op=True)
        self._full, self._pending = full, (work, source)

    def _cast(self) -> Tensor:
        """The parameter shard in the dtype of the compute."""
        with category("gathered"):
            return self.params if self.params.dtype == self.compute else self.params.to(self.compute)

    def weights(self) -> dict[str, Tensor]:
        """Views of the full parameters, gathered by now."""
        if self.shard.size == 1 and self.updated is not None:
            self.updated.wait()
        self.gather()
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None
        assert self._full is not None
        return self.contents.views(self._full)

    @property
    def full(self) -> Tensor:
        """The full parameters as one flat buffer, gathered by now."""
        self.weights()
        assert self._full is not None
        return self._full

    @property
    def full_grads(self) -> Tensor:
        """The open full gradients as one flat buffer."""
        assert self._full_grads is not None, f"{self.contents.key} has no open gradients"
        return self._full_grads

    def release(self) -> None:
        """Free the full parameters."""
        assert self._pending is None, f"{self.contents.key} is released while being gathered"
        self._full = None

    def begin_step(self) -> None:
        """The gradients are those of a step that is over: what comes next takes their place."""
        self._stale = True

    def open_grads(self) -> dict[str, Tensor]:
        """Views of a zeroed full gradient buffer, or of the gradient shard itself where that is
        the full one.
        """
        assert self._full_grads is None, f"{self.contents.key} has open gradients"
        if self.shard.size == 1 and self.grad_dtype == self.reduce_dtype:
            if self._grads is None:
                self._grads, self._stale = self._zero_grads(), False
            self._full_grads = self._grads
            if self._stale:
                self._grads.zero_()
                self._stale = False
        else:
            with category("gathered_grads"):
                self._full_grads = torch.zeros(
                    self.shard_numel * self.shard.size, dtype=self.reduce_dtype, device=self.platform.device
                )
        return self.contents.views(self._full_grads)

    def opened_grads(self) -> dict[str, Tensor]:
        """Views of the full gradient buffer, which may be open already."""
        return self.open_grads() if self._full_grads is None else self.contents.views(self._full_grads)

    def reduce(self) -> None:
        """Start summing the full gradients over the shard's ranks."""
        full, self._full_grads = self._full_grads, None
        assert full is not None
        if full is self._grads:
            return
        if self.shard.size == 1:
            self._accumulate(full)
            return
        with category("gathered_grads"):
            part = torch.empty(self.shard_numel, dtype=self.reduce_dtype, device=self.platform.device)
        work = collectives.reduce_scatter_single(part, full, self.shard.handle, async_op=True)
        self._reducing = (work, part, full)

    def finish_reduce(self) -> None:
        """Add the summed gradients to the shard and free the buffers."""
        if self._reducing is not None:
            work, part, _ = self._reducing
            self._reducing = None
            work.wait()
            self._accumulate(part)

    def _accumulate(self, part: Tensor) -> None:
        if self._grads is None:
            with category("grads"):
                self._grads = recategorize(part.to(self.grad_dtype), "grads")
            self._stale = False
        elif self._stale:
            self.grads.copy_(part)
            self._stale = False
        else:
            self.grads.add_(part)

    def replicate(self) -> bool:
        """Start summing the gradient shard over its replicas (once a step, after the last microbatch);
        whether there are any."""
        if self.replicas.size > 1:
            self._replicating = collectives.all_reduce(self.grads, self.replicas.handle, async_op=True)
        return self.replicas.size > 1

    def finish_replicate(self) -> None:
        if self._replicating is not None:
            self._replicating.wait()
            self._replicating = None


def release(units: Sequence[Unit]) -> None:
    """Free the full parameters of several units."""
    for unit in units:
        unit.release()
