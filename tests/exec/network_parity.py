"""What one rank does in the parity tests of networks: `verify` of a plan."""

import torch
import torch.distributed as dist
from torch import Tensor

from mopexec.check.verify import compare, targets_of
from mopexec.data.dataset import IGNORED
from mopexec.distributed.tiers import Platform
from mopexec.operators.documents import Documents
from mopexec.run.job import RankJob
from mopsim.common import io
from mopsim.spec.plan import Plan


def differences(platform: Platform, plan: Plan, masked: bool = False) -> dict[str, float | str] | None:
    """Of two steps from the single-device model's; None on other ranks than the first. masked: half of the
    targets do not count.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    job = RankJob(rank, world, rank, world, False, platform)
    found = compare(plan, job, 2, _half if masked else targets_of)
    return None if found is None else io.to_plain(found)


def _half(tokens: Tensor, documents: Documents) -> Tensor:
    """Targets of which those after an even token do not count."""
    targets = targets_of(tokens, documents)
    return torch.where(tokens[:, :-1] % 2 == 0, IGNORED, targets)
