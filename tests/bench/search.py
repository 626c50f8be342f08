"""Searches of all families that a buyer would ask for: how long they take, and what they find and leave.

python -m tests.bench.search FOLDER [jobs]
"""

import os
import sys
import time
from pathlib import Path

import mopsim
from mopsim.common.io import write_text
from mopsim.common.units import format_seconds
from mopsim.search.result import format_gap
from mopsim.spec.line import describe
from tests.bench.size import seconds

PROBLEMS = (
    ("deepseek_v3", "h100-sxm-80g", 128, "4K", 15360),
    ("kimi_k2", "h200-sxm-141g", 64, "4K", 4096),
    ("qwen3_235b_a22b", "h100-sxm-80g", 32, "4K", 1024),
    ("qwen3_30b_a3b", "h100-sxm-80g", 4, "4K", 512),
    ("mixtral_8x7b", "h100-sxm-80g", 1, "8K", 256),
    ("gpt_oss_120b", "b200-sxm-192g", 1, "128K", 16),
    ("gpt_oss_120b", "h200-sxm-141g", 2, "4K", 512),
    ("olmoe_1b_7b", "rtx4090-24g", 1, "4K", 256),
    ("mop_120b", "h200-sxm-141g", 2, "128K", 16),
    ("mop_1t", "h200-sxm-141g", 12, "1M", 96),
)
"""Network, machine, nodes, tokens and sequences of a step."""
HEAD = "| network | cluster | tokens | wall, s | CPU, s | simulated | winner | a step | left out |"


def line(model: str, hardware: str, nodes: int, seq_len: str, batch: int, jobs: int) -> str:
    """One search, as a row."""
    wall, cpu = time.perf_counter(), seconds()
    found = mopsim.search(model, hardware, nodes=nodes, seq_len=seq_len, global_batch=batch, jobs=jobs).found
    wall, cpu = time.perf_counter() - wall, seconds() - cpu
    best = found.best
    said = (
        f"{best.strategy.name} `{describe(best.strategy)}` | {format_seconds(best.step_time)}"
        if best
        else "nothing fits |"
    )
    gap = (
        "proven"
        if found.proven
        else f"at most {format_gap(found.gap)} faster"
        if found.gap is not None
        else "may fit"
    )
    cells = (
        model, f"{nodes} x {hardware}", f"{seq_len} x {batch:,}", f"{wall:.0f}", f"{cpu:.0f}",
        str(found.simulated), said, gap,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main(folder: Path, jobs: int) -> None:
    """Search all, print a row for each, write `search.md` into `folder`."""
    rows = []
    for problem in PROBLEMS:
        rows.append(line(*problem, jobs))
        print(rows[-1], flush=True)
    load = os.getloadavg()[1]
    said = (
        f"All families, 100 simulations of each at most, in {jobs} processes (load {load:.1f} on "
        f"{os.cpu_count()} cores)."
    )
    lines = [
        "# Searches",
        "",
        f"`python -m tests.bench.search FOLDER`. {said}",
        "",
        HEAD,
        f"|{'---|' * 9}",
        *rows,
    ]
    write_text(folder / "search.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else os.cpu_count() or 1)
