"""AdamW on this rank's shards, with a global norm over shards of different kinds, on device or
host."""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopexec.distributed import collectives
from mopexec.distributed.tiers import Platform
from mopexec.measure.scope import category, host_compute
from mopexec.measure.tracker import mark_host, recategorize
from mopexec.operators.adamw import Intervals, adamw_, clip_factor, runs
from mopsim.spec.training import TrainSpec


@dataclass(frozen=True)
class Shard:
    """One parameter's local shard, or that of a flat buffer of several. copies: ranks of the world that hold
    these very elements. undecayed: what of it, flat, has no weight decay.
    """

    name: str
    value: Tensor
    copies: int
    undecayed: Intervals = ()


class ShardedAdamW:
    """AdamW over local shards: no DTensor op, so dense and expert shards of different meshes need no
    special care.

    host: state and update in host memory.
    """

    def __init__(self, shards: list[Shard], training: TrainSpec, platform: Platform, *, host: bool) -> None:
        self._platform, self._host, self._training = platform, host, training
        self.shards, self.learning_rate = shards, training.learning_rate
        self._device = torch.device("cpu") if host and not platform.fake else platform.device
        self._values = {s.name: s.value.detach() for s in shards if s.value.numel()}
        self._runs = {s.name: list(runs(0, s.value.numel(), s.undecayed)) for s in shards}
        self.coefficient = torch.ones(())
        """What the last step multiplied the gradients by, where it works."""
        with self._tier():
            self._state = self._make_state()

    def set_lr(self, lr: float) -> None:
        self.learning_rate = lr

    @torch.no_grad()
    def step(self, grads: dict[str, Tensor]) -> Tensor:
        """Clip `grads` (by parameter name) in place by their global norm, update; returns the norm before
        clipping, on the device.
        """
        with self._tier():
            norm = self._global_norm(grads)
            names = [name for name in self._values if name in grads]
            present = [grads[name] for name in names]
            if self._training.clip_norm:
                self.coefficient = clip_factor(norm, self._training.clip_norm).to(self._device)
                if present:
                    torch._foreach_mul_(present, self.coefficient)
            if present:
                torch._foreach_add_([self._state["step"][name] for name in names], 1)
                for decay in (True, False):
                    self._update(names, grads, decay=decay)
        return norm

    def _update(self, names: list[str], grads: dict[str, Tensor], *, decay: bool) -> None:
        """The elements that decay, or those that do not, of all shards at once."""
        some = [(name, low, high) for name in names for low, high, on in self._runs[name] if on == decay]
        if some:
            state = self._state
            masters, present, moments, squares = (
                [_part(held[name], low, high) for name, low, high in some]
                for held in (self._values, grads, state["exp_avg"], state["exp_avg_sq"])
            )
            steps, rate = [state["step"][name] for name, _, _ in some], self.learning_rate
            adamw_(masters, present, moments, squares, steps, rate, self._training, decay=decay)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Moments by kind (exp_avg, exp_avg_sq) and parameter name; and `step`, 0-dim."""
        return self._state

    def _global_norm(self, grads: dict[str, Tensor]) -> Tensor:
        """The 2-norm of all gradients of the model: squares summed over ranks, each element counted once."""
        square = torch.zeros((), dtype=torch.float64, device=self._device)
        for copies in sorted({shard.copies for shard in self.shards}):
            some = [
                grads[s.name]
                for s in self.shards
                if s.copies == copies and s.name in grads and s.value.numel()
            ]
            if some:
                total = torch.stack(torch._foreach_norm(some, 2, dtype=_norm_dtype(some[0]))).square().sum()
                square = square + total.double() / copies
        square = square.to(self._platform.device)
        collectives.all_reduce(square)
        return square.sqrt()

    def _make_state(self) -> dict[str, dict[str, Tensor]]:
        """Zero moments, resident from the start."""
        kinds: dict[str, dict[str, Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}, "step": {}}
        with category("optimizer"):
            for name, value in self._values.items():
                kinds["step"][name] = torch.zeros((), dtype=torch.float32, device=value.device)
                kinds["exp_avg"][name], kinds["exp_avg_sq"][name] = (torch.zeros_like(value) for _ in "12")
        if self._host:
            for tensors in kinds.values():
                _mark_all(tensors.values())
        return kinds

    def _tier(self) -> Any:
        return host_compute() if self._host else nullcontext()


def _part(whole: Tensor, low: int, high: int) -> Tensor:
    """Elements [low, high) of its flat order, a view."""
    return whole if high - low == whole.numel() else whole.view(-1)[low:high]


def _norm_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _mark_all(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        mark_host(tensor, "optimizer")
        recategorize(tensor, "optimizer")
