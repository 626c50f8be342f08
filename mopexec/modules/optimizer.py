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
from mopexec.operators.adamw import adamw_, clip_factor
from mopsim.spec.training import TrainSpec


@dataclass(frozen=True)
class Shard:
    """One parameter's local shard. copies: ranks of the world that hold these very elements."""

    name: str
    value: Tensor
    copies: int


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
                moments, squares, steps = (
                    [self._state[kind][name] for name in names] for kind in ("exp_avg", "exp_avg_sq", "step")
                )
                torch._foreach_add_(steps, 1)
                masters = [self._values[name] for name in names]
                adamw_(masters, present, moments, squares, steps, self.learning_rate, self._training)
        return norm

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


def _norm_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _mark_all(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        mark_host(tensor, "optimizer")
        recategorize(tensor, "optimizer")
