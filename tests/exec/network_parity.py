"""What one rank does in the parity tests of networks: `verify` of a plan."""

import torch.distributed as dist

from mopexec.check.verify import compare
from mopexec.distributed.tiers import Platform
from mopexec.run.job import RankJob
from mopsim.common import io
from mopsim.spec.plan import Plan


def differences(platform: Platform, plan: Plan) -> dict[str, float | str] | None:
    """Of two steps from the single-device model's; None on other ranks than the first."""
    rank, world = dist.get_rank(), dist.get_world_size()
    job = RankJob(rank, world, rank, world, 0, platform)
    found = compare(plan, job, 2)
    return None if found is None else io.to_plain(found)
