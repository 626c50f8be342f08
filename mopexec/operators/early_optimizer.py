"""AdamW under the backward, where nothing is clipped: units are updated once their gradients are final, which
are freed then.

Groups of units, in the order in which the last backward of a step sums their gradients, share buckets: the
state of the first of them goes up before the loss, that of others once a bucket before has left its slot. The
current stream waits for a group's update when the next group's gradients come, and frees its gradients then:
of a step with one microbatch no more than one group's are there beside those on their way. So none is updated
beside the next step; only the last buckets' state is still on its way down. State on the device waits for
nothing: its update, which takes all of the device as a backward's kernels do, is on the current stream.
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from mopexec.distributed.background import Signal
from mopexec.distributed.tiers import Platform
from mopexec.measure.tracker import category, component, phase
from mopexec.operators.optimizer import FlatAdamW, Unit
from mopsim.spec import layout
from mopsim.spec.layout import Bucket, Slice
from mopsim.spec.strategy import Optimizer, Precision
from mopsim.spec.training import TrainSpec


class EarlyAdamW(FlatAdamW[Unit]):
    """groups: places in `units`, in the order in which `summed` is told of them. keeps: gradients outlive the
    step, for who compares them.
    """

    def __init__(
        self, units: Sequence[Unit], groups: Sequence[Sequence[int]], optimizer: Optimizer,
        precision: Precision, training: TrainSpec, platform: Platform,
    ) -> None:  # fmt: skip
        self.groups, self.keeps = [tuple(group) for group in groups], False
        self._of_groups: list[range] = []
        self._grad_dtype = getattr(torch, precision.grad)
        super().__init__(units, optimizer, precision, training, platform)
        self.given: dict[int, Tensor] = {}
        """Gradients that are being updated by, by place of their unit."""
        with category("staging"):
            self._one = torch.ones((), dtype=self.update_dtype, device=platform.device)
        self._squares: dict[int, Tensor] = {}
        self._replicating: deque[tuple[int, ...]] = deque()
        self._updating: list[tuple[tuple[int, ...], Signal]] = []
        self._begun = self._number = 0
        self._live = False

    def _make_buckets(self, numels: list[int]) -> list[Bucket]:
        found: list[Bucket] = []
        for buckets in layout.early_buckets(self.groups, numels, self.optimizer.bucket_params):
            self._of_groups.append(range(len(found), len(found) + len(buckets)))
            found += buckets
        return found

    def _make_scratch(self) -> Tensor | None:
        """None where gradients, which nobody else reads, have the update's dtype."""
        return None if self._grad_dtype == self.update_dtype else super()._make_scratch()

    def begin_backward(self) -> None:
        """Updates begin: the state of the first buckets goes up."""
        self.given.clear()
        self.step_number += 1
        self._applied = (self.step_number, self.learning_rate)
        self._live, self._begun = True, 0
        if self._slots:
            self._background.run(self._load_first)

    def room(self) -> None:
        """What was updated is over: its gradients are freed."""
        for group, signal in self._updating:
            signal.wait()
            self._free_grads(group)
        self._updating.clear()

    def summed(self, units: Sequence[Unit]) -> None:
        """Update them; where they have replicas, once the next ones are summed."""
        if not self._live:
            return
        group = self.groups[self._begun]
        assert [self.units[place] for place in group] == list(units), "units are summed in another order"
        self._begun += 1
        replicated = [unit.replicate() for unit in units]
        waiting = len(self._replicating)
        self._replicating.append(group)
        for _ in range(waiting + (not any(replicated))):
            self._update(self._replicating.popleft())

    def squares(self) -> list[Tensor]:
        """See `FlatAdamW.squares`."""
        while self._replicating:
            self._update(self._replicating.popleft())
        return [self._squares.pop(place) for place in range(len(self.units))]

    def step(self, clip: Tensor) -> None:
        """All units are updated. clip: 1."""
        assert not self.training.clip_norm, "refused by TrainSpec.check_strategy"
        self.room()
        self._live, self._number = False, 0

    def preload(self) -> None:
        """It was, before the loss."""

    def _update(self, group: tuple[int, ...]) -> None:
        """Begin to update a group, the first that is not yet."""
        for place in group:
            unit = self.units[place]
            unit.finish_replicate()
            self._squares[place] = unit.square(self.update_dtype)
            self.given[place] = unit.take_grads()
        buckets = self._of_groups[self._number]
        self._number += 1
        with component("optimizer"), phase("optimizer"):
            if self._slots:
                self._stream_beside(group, buckets)
                return
            for index in buckets:
                for piece in self.buckets[index]:
                    self._update_on_device(piece, self._one)
            self._free_grads(group)

    def _free_grads(self, group: tuple[int, ...]) -> None:
        if not self.keeps:
            for place in group:
                del self.given[place]

    def _stream_beside(self, group: tuple[int, ...], buckets: range) -> None:
        signal = Signal(self._background)
        signal.clear()
        self._updating.append((group, signal))

        def update() -> None:
            for index in buckets:
                self._update_streamed(index)
            signal.set()

        self._background.run(update)

    def _update_streamed(self, index: int) -> None:
        """Update a bucket in its slot; the next one's state takes its place."""
        bucket, place, ahead = self.buckets[index], index % len(self._slots), index + len(self._slots)
        slot = self._slots[place]
        self.platform.wait(self._loaded.pop(index))
        self._update_slot(bucket, slot, self._one)
        self._free[place] = self._store(bucket, slot)
        if ahead < len(self.buckets):
            self._loaded[ahead] = self._load(self.buckets[ahead], slot, self._free[place])

    def _clipped(self, piece: Slice, clip: Tensor) -> Tensor:
        """The gradient itself, where its dtype is the update's."""
        place, start, stop = piece
        grad = self.given[place][start:stop]
        return grad if self._scratch is None else self._scratch[: stop - start].copy_(grad)
