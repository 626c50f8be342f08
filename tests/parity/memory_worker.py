"""One rank of real training, tracked. `RANK WORLD FOLDER [CASE...]` writes FOLDER/rank{RANK}.json."""

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mopexec.check.dry_run import tracked_step
from mopexec.distributed.tiers import Platform
from mopexec.measure.tracker import MemoryTracker
from tests.parity.memory_cases import trained


def main(rank: int, world: int, folder: Path, only: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), world), rank=rank, world_size=world
    )
    found = {}
    for name, plan in trained(world).items():
        if only and name not in only:
            continue
        found[name] = tracked_step(plan, rank, Platform(torch.device("cpu")), MemoryTracker()).to_json()
        gc.collect()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
