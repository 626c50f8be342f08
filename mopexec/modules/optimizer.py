"""torch's fused AdamW on this rank's shards, with a global norm over shards of different kinds, on device
or host."""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mopexec.distributed import collectives
from mopexec.distributed.tiers import Platform
from mopexec.measure.scope import category, host_compute
from mopexec.measure.tracker import mark_host, recategorize
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

    Decoupled decay on every parameter, as torch.optim.AdamW. host: state and update in host memory.
    """

    def __init__(self, shards: list[Shard], training: TrainSpec, platform: Platform, *, host: bool) -> None:
        self._platform, self._host, self._clip_norm = platform, host, training.clip_norm
        self.shards = shards
        self._device = torch.device("cpu") if host and not platform.fake else platform.device
        self._parameters = {s.name: nn.Parameter(s.value.detach()) for s in shards if s.value.numel()}
        self.coefficient = torch.ones(())
        """What the last step multiplied the gradients by, where it works."""
        self._optimizer = torch.optim.AdamW(
            self._parameters.values() if self._parameters else [nn.Parameter(torch.zeros(1))],
            lr=training.learning_rate,
            betas=(training.beta1, training.beta2),
            eps=training.eps,
            weight_decay=training.weight_decay,
            fused=True,
        )
        with self._tier():
            self._make_state()

    def set_lr(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def step(self, grads: dict[str, Tensor]) -> Tensor:
        """Clip `grads` (by parameter name) in place by their global norm, update; returns the norm before
        clipping, on the device.

        torch's formula: the coefficient is clip_norm / (norm + 1e-6), at most 1.
        """
        with self._tier():
            present = [grads[name] for name in self._parameters if name in grads]
            norm = self._global_norm(grads)
            if self._clip_norm:
                factor = (self._clip_norm / (norm + 1e-6)).clamp(max=1.0)
                self.coefficient = factor.to(self._device)
                if present:
                    torch._foreach_mul_(present, self.coefficient)
            for name, parameter in self._parameters.items():
                parameter.grad = grads.get(name)
            self._optimizer.step()
            for parameter in self._parameters.values():
                parameter.grad = None
        return norm

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Moments by kind (exp_avg, exp_avg_sq) and parameter name; and `step`."""
        kinds: dict[str, dict[str, Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}, "step": {}}
        for name, parameter in self._parameters.items():
            for kind, values in kinds.items():
                values[name] = self._optimizer.state[parameter][kind]
        return kinds

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

    def _make_state(self) -> None:
        """The zero moments that torch would make in its first step: resident from the start."""
        for parameter in self._parameters.values():
            state: dict[str, Any] = self._optimizer.state[parameter]
            with category("optimizer"):
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = (
                    torch.zeros_like(parameter),
                    torch.zeros_like(parameter),
                )
            if self._host:
                _mark_all(state.values())

    def _tier(self) -> Any:
        return host_compute() if self._host else nullcontext()


def _norm_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _mark_all(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        mark_host(tensor, "optimizer")
        recategorize(tensor, "optimizer")
