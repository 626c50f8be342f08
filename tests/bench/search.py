"""Searches of all families that a buyer would ask for: how long they take, and what they find and leave.

python -m tests.bench.search FOLDER [jobs]

Of problems that no search proves: how much longer the plan of a family takes than the fastest known one of
that family (search.yaml).
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from msgspec.structs import replace

import mopsim
from mopsim.common.io import read_yaml, write_text
from mopsim.common.units import format_seconds
from mopsim.engine import SimResult
from mopsim.search.result import format_gap
from mopsim.spec.line import describe
from mopsim.strategies import AS_STACK
from tests.bench.size import seconds

PROBLEMS = Path(__file__).with_suffix(".yaml")
HEAD = (
    "network", "cluster", "tokens", "wall, s", "CPU, s", "simulated", "winner", "a step", "left out", "known",
    "slower",
)  # fmt: skip


def line(problem: dict[str, Any], jobs: int) -> str:
    """One search, as a row."""
    problem = dict(problem)
    family, known = problem.pop("family", ""), problem.pop("known", None)
    wall, cpu = time.perf_counter(), seconds()
    found = mopsim.search(**problem, jobs=jobs).found
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
        problem["model"], f"{problem['nodes']} x {problem['hardware']}",
        f"{problem['seq_len']} x {problem['global_batch']:,}", f"{wall:.0f}", f"{cpu:.0f}",
        str(found.simulated), said, gap,
        regret(problem, family, known, found.best_by_family[family]) if known else " | ",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def regret(problem: dict[str, Any], family: str, known: dict[str, Any], best: SimResult | None) -> str:
    """Two cells: the step time of the fastest known plan of a family, and by how much longer the one of that
    family takes that was found. A plan that may not fit is told; a search finds what fits for sure."""
    hides = known.pop("overlap", [])
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
    strategy = getattr(mopsim, family)(**given, overlap=replace(AS_STACK, **dict.fromkeys(hides, True)))
    played = mopsim.simulate(**problem, strategy=strategy).result
    slower = best.step_time / played.step_time - 1 if best else float("inf")
    odds = "" if played.sure else f" (fits with {played.p_fits:.0%})"
    return f"{format_seconds(played.step_time)}{odds} | {slower:.1%}"


def main(folder: Path, jobs: int) -> None:
    """Search all, print a row for each, write `search.md` into `folder`."""
    rows = []
    for problem in read_yaml(PROBLEMS, "problems"):
        rows.append(line(problem, jobs))
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
        f"| {' | '.join(HEAD)} |",
        f"|{'---|' * len(HEAD)}",
        *rows,
    ]
    write_text(folder / "search.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else os.cpu_count() or 1)
