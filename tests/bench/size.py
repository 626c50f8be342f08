"""Six machine types, 1 to 4,096 GPUs, every family: how long `mopsim size` takes, and what it answers.

python -m tests.bench.size FOLDER [jobs]
"""

import os
import resource
import sys
import time
from pathlib import Path

import mopsim
from mopsim.common.io import write_text
from mopsim.report.sizing import columns, missed, row, steps, summary
from mopsim.report.tables import describe

MACHINES = ("a100-sxm-80g", "h100-sxm-80g", "h200-sxm-141g", "b200-sxm-192g", "gb200-186g", "mi300x-192g")
DEVICES = 4096
ASKED = 90
"""Seconds, with a core for each of two processes."""
QUESTION = {"model": "qwen3_235b_a22b", "tokens": "10T", "days": 60}


def seconds() -> float:
    """CPU seconds of this process and of those that it ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def main(folder: Path, jobs: int) -> None:
    """Ask, time it, write the page, its figures and README.md into `folder`."""
    machines = [mopsim.load_hardware(name) for name in MACHINES]
    wall, cpu = time.perf_counter(), seconds()
    found = mopsim.size(
        hardware=machines, max_devices=DEVICES, jobs=jobs,
        progress=lambda done, total, text: print(f"{done} of {total} so far: {text}", file=sys.stderr),
        **QUESTION,
    )  # fmt: skip
    wall, cpu = time.perf_counter() - wall, seconds() - cpu
    found.write(folder, "python -m tests.bench.size")
    simulated = sum(one.simulated for one in found.sizings)
    names = columns(found.request)
    lines = [
        "# Sizing of six machine types",
        "",
        "`python -m tests.bench.size`: Qwen3-235B on 10T tokens within 60 days, every family, up to "
        f"{DEVICES:,} GPUs of each of {len(MACHINES)} machine types.",
        "",
        f"{wall:.0f} s of wall clock in {jobs} processes (load {os.getloadavg()[1]:.1f} on {os.cpu_count()} "
        f"cores), {cpu:.0f} s of CPU: {cpu / jobs:.0f} s if each process had a core "
        f"({'missed: ' if cpu / 2 > ASKED else ''}{ASKED} s of two cores are asked). "
        f"{simulated:,} simulations, {sum(len(one.tried) for one in found.sizings)} clusters.",
        "",
        f"Recommended: {summary(found.chosen)}." if found.chosen else f"None; {missed(found.miss)}.",
        "",
        f"Fastest of the counts that were asked: {summary(found.fastest)}.",
        "",
        f"| {' | '.join(names)} | plan or reason |",
        f"|{'---|' * (len(names) + 1)}",
    ]
    for sizing in found.sizings:
        best = sizing.best
        if best is None or best.result is None:
            lines.append(f"| {sizing.hardware.name} |{' |' * (len(names) - 1)} {sizing.why} |")
        else:
            cells = row(best, found.request)
            lines.append(f"| {' | '.join(cells)} | {describe(best.result.strategy)}; {steps(best)} |")
    write_text(folder / "README.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else os.cpu_count() or 1)
