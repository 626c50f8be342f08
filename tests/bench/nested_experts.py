"""Chunks of experts whose rows are sent again in the backward, and under nested checkpoints: time and memory.

`python -m tests.bench.nested_experts [FOLDER]` (a minute): a step of a small network on two ranks of this
machine, the two by turns; Qwen3-30B-A3B on a node of H200, simulated and, its memory, in a dry run.
"""

import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mopexec.check.dry_run import dry_run
from mopexec.distributed.tiers import Platform
from mopexec.run import apply
from mopsim.common import io
from mopsim.common.units import GIB
from mopsim.engine import simulate
from mopsim.spec.plan import Plan
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.training import TrainSpec
from mopsim.strategies import mop
from tests.exec.flat_parity import make_tokens, my_batches
from tests.exec.spawn import pool
from tests.parity.memory_cases import nested
from tests.plans import plan_of
from tests.sim.toys import small

ROUNDS = 9
CASES = ((32768, 8192), (131072, 16384))
STACKS = ("mopexec-flat", "mopexec-flat-nested")
SMALL = small(
    hidden_size=256, num_hidden_layers=3, num_local_experts=16, num_experts_per_tok=4,
    moe_intermediate_size=256,
)  # fmt: skip


def here() -> list[Plan]:
    """The small job of two ranks, by stack."""
    strategy = mop(
        2, expert_parallel=2, vocab_parallel=2, expert_chunk_tokens=512, dtype="float32", optimizer="device"
    )
    training = TrainSpec(seq_len=2048, global_batch=2)
    return [plan_of(SMALL, one, training, "cpu") for one in (strategy, nested(strategy))]


def timed(platform: Platform, plans: list[Plan]) -> list[list[float]]:
    """Seconds of the steps of each plan, by turns; the first round, which warms up, is left out."""
    rank = torch.distributed.get_rank()
    runners = [apply.build(plan, platform, seed=1) for plan in plans]
    batches = my_batches(plans[0], make_tokens(plans[0], 0), rank, platform.device)
    found: list[list[float]] = [[] for _ in plans]
    for _ in range(ROUNDS):
        for runner, seconds in zip(runners, found, strict=True):
            torch.distributed.barrier()
            begin = time.perf_counter()
            runner.step(batches)
            seconds.append(time.perf_counter() - begin)
    return [one[1:] for one in found]


def planned(tokens: int, chunk_tokens: int) -> list[dict[str, float]]:
    """Qwen3-30B-A3B on 8 H200, so many tokens a rank, by stack: simulated seconds, those in which compute
    waits for exchanges, the most bytes of rows on their way or kept, and the peak; the peak of a dry run."""
    strategy = mop(
        8, expert_parallel=8, vocab_parallel=8, expert_chunk_tokens=chunk_tokens, loss_chunk_tokens=8192
    )
    model, training = load_model("qwen3_30b_a3b"), TrainSpec(seq_len=tokens, global_batch=8)
    found = []
    for one in (strategy, nested(strategy)):
        plan = plan_of(model, one, training, "cuda")
        hardware = load_profile("h200-sxm-141g")
        result = simulate(model, hardware, 1, plan.strategy, training, plan.stack, timeline=True)
        rows = max(result.memory_curve_by_category["dispatch"])
        gib = {"rows": rows, "peak": result.peak_memory, "dry_run_peak": dry_run(plan).peak_memory}
        found.append(
            {"step_s": result.step_time, "waits_for_exchanges_s": result.exposed["all_to_all"]}
            | {f"{name}_gib": size / GIB for name, size in gib.items()}
        )
    return found


def main(folder: Path) -> None:
    seconds = pool(2).run("tests.bench.nested_experts", "timed", here())[0]
    runs: dict[str, Any] = {
        "two ranks of a CPU": [{"step_s": min(one), "middle_step_s": median(one)} for one in seconds]
    }
    for tokens, chunk in CASES:
        runs[f"{tokens:,} tokens a rank, chunks of {chunk:,}"] = planned(tokens, chunk)
    more = sorted(kept / again - 1 for again, kept in zip(*seconds, strict=True))
    io.write_json(str(folder / "nested_experts.json"), {"stacks": STACKS, "rounds": seconds, "runs": runs})
    for name, (again, kept) in runs.items():
        for key, value in again.items():
            print(f"{name:44}{key:24}{value:10.3f}{kept[key]:10.3f}{kept[key] / value - 1:+8.1%}")
    print(f"rounds on the CPU: {more[0]:+.1%} to {more[-1]:+.1%}, the middle one {median(more):+.1%}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "reports/executor"))
