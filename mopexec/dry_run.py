"""One rank's memory at full scale, without the hardware: the executor's own step on tensors without data.

A fake process group of the plan's world size answers every collective at once, fake tensors have shapes and
no data, and the memory tracker counts them as it counts real ones. Routing follows the plan's profile.
Not in it: communication buffers, workspaces of kernels, fragmentation.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mopexec.measure.tracker import MemoryTracker
from mopexec.tiers import Platform
from mopsim.spec.errors import MopError, SpecError
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import Plan


@dataclass(frozen=True)
class DryRunResult:
    """Bytes of one rank. resident: alive after build and after the step; peaks are over build and step.

    seconds: how long the dry run took, not a prediction.
    """

    rank: int
    peak_memory: int
    memory_by_category: dict[str, int]
    peak_component: str
    peak_phase: str
    resident_memory: int
    resident_by_category: dict[str, int]
    host_memory: int
    host_by_category: dict[str, int]
    num_ops: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The keys of `mopexec dry-run --json` (bytes and seconds)."""
        return {
        model.hidden_size, model.intermediate_size, model.vocab_size, model.head_dim, *heads,
        model.moe_intermediate_size, model.num_local_experts, model.shared_expert_intermediate_size,
        *(count * model.head_dim for count in heads),
    }  # fmt: skip


@contextmanager
def _no_shape_propagation(tracker: MemoryTracker) -> Iterator[None]:
    """Leave out the global-shape fakes that DTensor propagates shapes with: memory that no rank ever has.

    In a real run they belong to another fake mode and show as meta tensors; here they look like the rank's own.
    """
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    name = "_propagate_tensor_meta_non_cached"
    original = getattr(ShardingPropagator, name)

    def unseen(*args: Any, **kwargs: Any) -> Any:
        with tracker.paused():
            return original(*args, **kwargs)

    setattr(ShardingPropagator, name, unseen)
    try:
        yield
    finally:
        setattr(ShardingPropagator, name, original)
