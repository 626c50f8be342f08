"""One rank of real training, tracked."""

import gc
import warnings
from typing import Any

import torch
import torch.distributed as dist

from mopexec.check.dry_run import tracked_step
from mopexec.distributed.tiers import Platform
from mopexec.measure.tracker import MemoryTracker
from tests.parity.memory_cases import trained


def track(platform: Platform, world: int) -> dict[str, dict[str, Any]]:
    """What this rank's tracker sees, by case."""
    warnings.simplefilter("ignore")
    found = {}
    for name, plan in trained(world).items():
        seen = tracked_step(plan, dist.get_rank(), Platform(torch.device("cpu")), MemoryTracker())
        found[name] = seen.to_json()
        gc.collect()
    return found
