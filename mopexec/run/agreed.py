"""Numbers of a step that all ranks agree on: the largest of each."""

from typing import Any

import torch
import torch.distributed as dist

from mopexec.distributed.collectives import of_all
from mopexec.measure import card
from mopexec.measure.tracker import MemoryTracker
from mopexec.run.job import RankJob
from mopexec.run.signals import StopRequest

MISSING = -1.0


def largest(
    own: dict[str, float], tracker: MemoryTracker, stop: StopRequest, said: dict[str, float], job: RankJob
) -> dict[str, float]:
    """The largest of every rank's numbers: so the slowest sets the step time, and all stop at the same step.
    own: of this rank's step; said: by a rank's card (mopexec.measure.card), as far as it says anything.
    """
    numbers = {
        **own,
        "device": float(tracker.peak_memory),
        "host": float(tracker.host_memory),
        "stop": float(stop.requested),
        **{name: said.get(name, MISSING) for name in card.NAMES},
    }
    agreed = torch.tensor(list(numbers.values()), dtype=torch.float64, device=job.platform.device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    found = dict(zip(numbers, agreed.tolist(), strict=True))
    return {name: value for name, value in found.items() if value != MISSING}


def of_cards(found: dict[str, float]) -> dict[str, float]:
    """What `StepMetrics` has of cards, of `largest`'s numbers; nothing on a CPU."""
    said = {name: found[name] for name in card.NAMES if name in found}
    if "device_used_bytes" in said:
        said["unseen_bytes"] = said["device_used_bytes"] - found["device"]
    return said


def fullest(before: dict[str, int], found: dict[str, float]) -> dict[str, int]:
    """What `Measurement` has of cards: the larger of that of the steps before and of a step's (`largest`)."""
    here = {name: int(found[name]) for name in card.MEMORY if name in found}
    return {name: max(size, before.get(name, size)) for name, size in (before | here).items()}


def peaks(tracker: MemoryTracker, others: float) -> dict[str, Any]:
    """Peaks of the rank with the largest device peak, the largest host peak, and the largest part of its core
    that others had."""
    mine = {
        "peak_memory": tracker.peak_memory,
        "memory_by_category": tracker.memory_by_category,
        "host_memory": tracker.host_memory,
        "others": others,
    }
    everyone = of_all(mine)
    largest = max(everyone, key=lambda one: one["peak_memory"])
    return {**largest, **{name: max(one[name] for one in everyone) for name in ("host_memory", "others")}}
