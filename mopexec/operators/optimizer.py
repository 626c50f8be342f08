"""AdamW on flat shards, bucket by bucket: state on the device, on the host, or on the host streamed through
slots.

The update (`adamw`) is in the master weights' dtype or float32, whichever is wider. Buckets are slices of the
shards, so `bucket_params` is a cap.

With `overlap` the streamed update of a step runs beside the next forward: gradient norm and clip factor are
final by then, so it is the same update. A unit's gather waits for its own update (`Unit.updated`); the state
of the first buckets goes up in the tail of the backward. Its copies have streams of their own, or the layer
inputs of that forward would leave the device after all of its state. `finish` ends it, for whoever reads
parameters or state. What updates under the backward is in `mopexec.operators.early_optimizer`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from mopexec.distributed.background import Background, Signal
from mopexec.distributed.tiers import Platform
from mopexec.measure.tracker import category, host_compute
from mopexec.operators.adamw import LANES, Intervals, runs, sliced_adamw_
from mopexec.operators.dtypes import wide
from mopsim.spec import layout
from mopsim.spec.layout import Slice
from mopsim.spec.strategy import Optimizer, Precision
from mopsim.spec.training import TrainSpec


class Sharded(Protocol):
    """What is updated: flat shards [shard_numel] of parameters and of their gradients. updated: where the
    update runs beside the next step, what reads the parameters waits for it. undecayed: what of the shards
    has no weight decay.
    """

    params: Tensor
    shard_numel: int
    updated: Signal | None
    undecayed: Intervals

    @property
    def grads(self) -> Tensor: ...

    def take_grads(self) -> Tensor:
        """The gradients, from now on the caller's."""
        ...

    def square(self, dtype: torch.dtype) -> Tensor:
        """This rank's part of the squared norm of the gradients of all ranks (0-dim)."""
        ...

    def replicate(self) -> bool:
        """Start summing the gradients over replicas; whether there are any."""
        ...

    def finish_replicate(self) -> None:
        """Wait for `replicate`."""
        ...


Unit = TypeVar("Unit", bound=Sharded)


@dataclass
class UnitState:
    """Flat shards [shard_numel]: master (None where the parameter shard is the master), and the moments."""

    master: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def tensors(self) -> list[Tensor]:
        """What travels between the tiers, master first."""
        return [t for t in (self.master, self.exp_avg, self.exp_avg_sq) if t is not None]


class FlatAdamW(Generic[Unit]):
    """Optimizer of one rank's units. `step_number` counts updates done."""

    def __init__(
        self,
        units: Sequence[Unit],
        optimizer: Optimizer,
        precision: Precision,
        training: TrainSpec,
        platform: Platform,
    ) -> None:
        self.units, self.optimizer, self.training, self.platform = list(units), optimizer, training, platform
        self.learning_rate, self.step_number = training.learning_rate, 0
        self.master_dtype = getattr(torch, precision.masters)
        self.moments_dtype = getattr(torch, precision.moments)
        self.update_dtype = wide(self.master_dtype)
        self.on_host = optimizer.state_tier == "host"
        self.states = [self._make_state(unit, precision.master != "param") for unit in self.units]
        self.buckets = self._make_buckets([unit.shard_numel for unit in self.units])
        self._host_grads, self._host_params = self._host_staging()
        self._applied = (0, self.learning_rate)
        self._loaded: dict[int, Any] = {}
        self._ends = self._room_for_ends()
        beside = optimizer.overlap != "none"
        self._up, self._down = ("state_h2d", "state_d2h") if beside else ("h2d", "d2h")
        self._background = Background(platform, "update")
        self._slots = self._make_slots() if beside and self.on_host else []
        self._scratch = self._make_scratch() if beside else None
        self._free: list[Any] = [None for _ in self._slots]
        self.overlapped = optimizer.overlap == "next_forward"
        if self.overlapped:
            for unit in self.units:
                unit.updated = Signal(self._background)

    def _make_buckets(self, numels: list[int]) -> list[layout.Bucket]:
        return layout.optimizer_buckets(numels, self.optimizer.bucket_params)

    def _room_for_ends(self) -> Tensor:
        """Room of `sliced_adamw_`, where the update is."""
        shape, dtype = (4, LANES), self.update_dtype
        if self.optimizer.update_on == "host":
            return self.platform.host_empty(shape, dtype, "staging")
        with category("staging"):
            return torch.empty(shape, dtype=dtype, device=self.platform.device)

    def _make_scratch(self) -> Tensor | None:
        """Room for the clipped gradient of a slice."""
        largest = max(stop - start for bucket in self.buckets for _, start, stop in bucket)
        with category("staging"):
            return torch.empty(largest, dtype=self.update_dtype, device=self.platform.device)

    def _make_state(self, unit: Unit, own_master: bool) -> UnitState:
        def make(dtype: torch.dtype) -> Tensor:
            if self.on_host:
                return self.platform.host_empty((unit.shard_numel,), dtype, "optimizer").zero_()
            with category("optimizer"):
                return torch.zeros(unit.shard_numel, dtype=dtype, device=self.platform.device)

        master = make(self.master_dtype) if own_master else None
        return UnitState(master, make(self.moments_dtype), make(self.moments_dtype))

    def _host_staging(self) -> tuple[list[Tensor], list[Tensor]]:
        """Two buckets of gradients and of parameters in the host tier, where the host updates."""
        if self.optimizer.update_on == "device":
            return [], []
        largest = max(layout.numel(bucket) for bucket in self.buckets)
        param = self.units[0].params.dtype
        return (
            [self.platform.host_empty((largest,), self.update_dtype, "staging") for _ in range(2)],
            [self.platform.host_empty((largest,), param, "staging") for _ in range(2)],
        )

    def squares(self) -> list[Tensor]:
        """Of each unit's gradients, summed over replicas, `Sharded.square`."""
        for unit in self.units:
            unit.replicate()
        for unit in self.units:
            unit.finish_replicate()
        return [unit.square(self.update_dtype) for unit in self.units]

    def begin_backward(self) -> None:
        """The last loss of a step is next."""

    def room(self) -> None:
        """Gradients of more units are about to be summed."""

    def summed(self, units: Sequence[Unit]) -> None:
        """These units' gradients are, over their shards' ranks."""

    def step(self, clip: Tensor) -> None:
        """Update all parameters from the units' gradient shards times `clip` (a 0-dim tensor in the update
        dtype).
        """
        self.step_number += 1
        if self.overlapped:
            self._begin(clip)
            return
        self._applied = (self.step_number, self.learning_rate)
        if not self.on_host:
            for bucket in self.buckets:
                for piece in bucket:
                    self._update_on_device(piece, clip)
        elif self.optimizer.update_on == "host":
            self._update_by_host(clip)
        else:
            self._stream(clip)

    @property
    def held_up(self) -> bool:
        """Whether the host waits where it gathers what is not updated yet, so that it should not do so
        early."""
        return self.overlapped and self._background.threaded

    def preload(self) -> None:
        """The backward is about to end: state of the first buckets goes up."""
        if self.overlapped:
            self._background.run(self._load_first)

    def finish(self) -> None:
        """Parameters and state are those after the last step."""
        self._background.finish()
        self._loaded.clear()
        for unit in self.units:
            if unit.updated is not None:
                unit.updated.wait()

    def _begin(self, clip: Tensor) -> None:
        """Update beside what follows. Every unit was gathered in this step: the last update is over."""
        for unit in self.units:
            assert unit.updated is not None
            unit.updated.wait()
            unit.updated.clear()
        self._applied = (self.step_number, self.learning_rate)
        self.platform.keep(clip, "update")
        self._background.run(lambda: self._stream(clip))

    def _load_first(self) -> None:
        for index, slot in enumerate(self._slots):
            self._loaded[index] = self._load(self.buckets[index], slot, self._free[index])

    def _make_slots(self) -> list[list[Tensor]]:
        """Staging buffers of the largest bucket's master weights and moments."""
        largest = max(layout.numel(bucket) for bucket in self.buckets)
        kept = [t.dtype for t in self.states[0].tensors()]
        with category("staging"):
            return [
                [torch.empty(largest, dtype=dtype, device=self.platform.device) for dtype in kept]
                for _ in range(min(self.optimizer.slots, len(self.buckets)))
            ]

    def _staging(self) -> AbstractContextManager[Any]:
        """The tracker's category; a thread beside the step must not change the step's."""
        return nullcontext() if self._background.threaded else category("staging")

    def _update_on_device(self, piece: Slice, clip: Tensor) -> None:
        unit, state = self.units[piece[0]], self.states[piece[0]]
        with self._staging():
            grad = self._clipped(piece, clip)
            params = unit.params[piece[1] : piece[2]]
            master = params if state.master is None else state.master[piece[1] : piece[2]]
            moments = [t[piece[1] : piece[2]] for t in (state.exp_avg, state.exp_avg_sq)]
            self._adamw(piece, master, grad, moments)
            if state.master is not None:
                params.copy_(master)

    def _stream(self, clip: Tensor) -> None:
        """State through `slots` slots on the device: H2D | update and refresh of the parameters | D2H, on
        three streams.

        Staging: slots * largest bucket * (master + moments + one gradient of the bucket being updated).
        """
        platform, slots = self.platform, self._slots or self._make_slots()
        free: list[Any] = self._free or [platform.record() for _ in slots]
        loaded, self._loaded = self._loaded, {}
        if 0 not in loaded:
            loaded[0] = self._load(self.buckets[0], slots[0], free[0])
        for index, bucket in enumerate(self.buckets):
            place = index % len(slots)
            following = index + 1
            if len(slots) > 1 and following < len(self.buckets) and following not in loaded:
                other = following % len(slots)
                loaded[following] = self._load(self.buckets[following], slots[other], free[other])
            platform.wait(loaded.pop(index))
            self._update_slot(bucket, slots[place], clip)
            self._signal(bucket)
            free[place] = self._store(bucket, slots[place])
            if len(slots) == 1 and following < len(self.buckets):
                loaded[following] = self._load(self.buckets[following], slots[0], free[0])
        for event in free:
            platform.wait(event)

    def _signal(self, bucket: Sequence[Slice]) -> None:
        """Units whose last slice is in the bucket are updated."""
        for place, _, stop in bucket:
            unit = self.units[place]
            if unit.updated is not None and stop == unit.shard_numel:
                unit.updated.set()

    def _load(self, bucket: Sequence[Slice], slot: list[Tensor], free: Any) -> Any:
        """Host state of a bucket into a slot, after the slot is free; returns the event of its arrival."""
        self.platform.wait(free, self._up)
        for host, device in self._pairs(bucket, slot):
            self.platform.copy(device, host, self._up)
        return self.platform.record(self._up)

    def _store(self, bucket: Sequence[Slice], slot: list[Tensor]) -> Any:
        """A slot back to the host; returns the event after which the slot is free."""
        return self.platform.store(*self._pairs(bucket, slot), stream=self._down)

    def _pairs(self, bucket: Sequence[Slice], slot: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """(host slice, slot slice) of everything that a bucket moves."""
        found, offset = [], 0
        for unit, start, stop in bucket:
            for host, device in zip(self.states[unit].tensors(), slot, strict=True):
                found.append((host[start:stop], device[offset : offset + stop - start]))
            offset += stop - start
        return found

    def _update_slot(self, bucket: Sequence[Slice], slot: list[Tensor], clip: Tensor) -> None:
        offset = 0
        for piece in bucket:
            unit, start, stop = piece
            here = [t[offset : offset + stop - start] for t in slot]
            offset += stop - start
            params = self.units[unit].params[start:stop]
            with self._staging():
                grad = self._clipped(piece, clip)
                own_master = self.states[unit].master is not None
                master = here.pop(0) if own_master else params
                self._adamw(piece, master, grad, here)
                if own_master:
                    params.copy_(master)
                del grad

    def _update_by_host(self, clip: Tensor) -> None:
        """Gradients down one bucket ahead, update on the host, parameters up."""
        events = [self._send_grads(0, clip)]
        for index, bucket in enumerate(self.buckets):
            if index + 1 < len(self.buckets):
                events.append(self._send_grads(index + 1, clip))
            self.platform.wait_host(events[index])
            place, offset = index % 2, 0
            for piece in bucket:
                unit, start, stop = piece
                numel, state = stop - start, self.states[unit]
                refreshed = self._host_params[place][offset : offset + numel]
                with host_compute(), category("staging"):
                    grad = self._host_grads[place][offset : offset + numel]
                    assert state.master is not None, "refused by check_supported"
                    master = state.master[start:stop]
                    moments = [state.exp_avg[start:stop], state.exp_avg_sq[start:stop]]
                    self._adamw(piece, master, grad, moments)
                    refreshed.copy_(master)
                self.platform.copy(self.units[unit].params[start:stop], refreshed)
                offset += numel

    def _send_grads(self, index: int, clip: Tensor) -> Any:
        arrived, offset = None, 0
        for piece in self.buckets[index]:
            with category("staging"):
                grad = self._clipped(piece, clip)
            numel = piece[2] - piece[1]
            arrived = self.platform.store((self._host_grads[index % 2][offset : offset + numel], grad))
            del grad  # before the next is made
            offset += numel
        return arrived

    def _clipped(self, piece: Slice, clip: Tensor) -> Tensor:
        unit, start, stop = piece
        grad = self.units[unit].grads[start:stop]
        if self._scratch is not None:
            return self._scratch[: stop - start].copy_(grad).mul_(clip)
        return grad.to(self.update_dtype, copy=True).mul_(clip)

    def _adamw(self, piece: Slice, master: Tensor, grad: Tensor, moments: list[Tensor]) -> None:
        """The fused update of a slice, in place; tensors in another dtype are widened and written back."""
        held = [master, *moments]
        used = [t if t.dtype == self.update_dtype else t.to(self.update_dtype) for t in held]
        number, rate = self._applied
        step = torch.full((), float(number), dtype=torch.float32, device=master.device)
        unit, start, stop = piece
        found = list(runs(start, stop, self.units[unit].undecayed))
        for decay in (True, False):
            some = [slice(low - start, high - start) for low, high, on in found if on == decay]
            if some:
                masters, given, averages, squares = (
                    [whole[at] for at in some] for whole in (used[0], grad, used[1], used[2])
                )
                sliced_adamw_(
                    masters, given, averages, squares, step, rate, self.training, self._ends, decay=decay
                )
        for kept, value in zip(held, used, strict=True):
            if kept is not value:
                kept.copy_(value)
