"""Searches of all families that a buyer would ask for: how long they take, what they find and leave, and
which of them take longer or miss the fastest known plan by more than is asked.

python -m tests.bench.search FOLDER [jobs]

Of problems that no search proves: how much longer the plan of a family takes than the fastest known one of
that family (search.yaml).
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace

import mopsim
from mopsim.common.io import read_yaml, write_text
from mopsim.common.units import format_seconds
from mopsim.engine import SimResult
from mopsim.search import Options
from mopsim.search.result import format_gap
from mopsim.spec.line import describe
from mopsim.strategies import AS_STACK
from tests.bench.size import seconds

PROBLEMS = Path(__file__).with_suffix(".yaml")
HEAD = (
    "network", "cluster", "tokens", "wall, s", "CPU, s", "simulated", "winner", "a step", "left out", "known",
    "slower",
)  # fmt: skip
ASKED_SECONDS, ASKED_SLOWER = 60, 0.01
"""Of one core: on two idle ones a search takes no longer. Of the plan found, over the fastest known one."""


@dataclass(frozen=True)
class Searched:
    """One search. cells: its row. cpu: seconds. slower: by how much longer the plan found takes than the
    known one, None where none is named, or one that may not fit."""

    cells: tuple[str, ...]
    cpu: float
    proven: bool
    slower: float | None

    @property
    def row(self) -> str:
        return f"| {' | '.join(self.cells)} |"


def line(problem: dict[str, Any], jobs: int) -> Searched:
    """One search."""
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
    told, slower = regret(problem, family, known, found.best_by_family[family]) if known else (("", ""), None)
    cells = (
        problem["model"], f"{problem['nodes']} x {problem['hardware']}",
        f"{problem['seq_len']} x {problem['global_batch']:,}", f"{wall:.0f}", f"{cpu:.0f}",
        str(found.simulated), said, gap, *told,
    )  # fmt: skip
    return Searched(cells, cpu, found.proven, slower)


def regret(
    problem: dict[str, Any], family: str, known: dict[str, Any], best: SimResult | None
) -> tuple[tuple[str, str], float | None]:
    """Two cells, the step time of the fastest known plan of a family and by how much longer the one of that
    family takes that was found, and this number. A plan that may not fit is told; a search finds what fits
    for sure."""
    hides = known.pop("overlap", [])
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
    strategy = getattr(mopsim, family)(**given, overlap=replace(AS_STACK, **dict.fromkeys(hides, True)))
    played = mopsim.simulate(**problem, strategy=strategy).result
    slower = best.step_time / played.step_time - 1 if best else float("inf")
    odds = "" if played.sure else f" (fits with {played.p_fits:.0%})"
    return (f"{format_seconds(played.step_time)}{odds}", f"{slower:.1%}"), slower if played.sure else None


def verdict(found: Sequence[Searched]) -> str:
    """What is asked of every search, and which rows miss it."""
    late = [number for number, one in enumerate(found, 1) if one.cpu > ASKED_SECONDS]
    known = [one.slower for one in found if one.slower is not None]
    far = [number for number, one in enumerate(found, 1) if (one.slower or 0.0) > ASKED_SLOWER]
    unsure = [number for number, one in enumerate(found, 1) if one.slower is None and one.cells[-1]]
    parts = (
        f"{ASKED_SECONDS} s on two cores, which {len(found) - len(late)} of {len(found)} keep by their CPU "
        f"time{_rows(late)}",
        f"of one not proven a plan at most {ASKED_SLOWER:.0%} slower than the fastest known one: "
        f"{len(known) - len(far)} of {len(known)}{_rows(far)}"
        f"{_rows(unsure, 'not counted, as the known plan may not fit')}",
        f"a proof or the gap that is left: {sum(one.proven for one in found)} of {len(found)} are proven, "
        "the others print their gap",
    )
    return f"Asked of each: {'; '.join(parts)}."


def _rows(numbers: Sequence[int], why: str = "missed") -> str:
    return f" ({why}: row {', '.join(map(str, numbers))})" if numbers else ""


def main(folder: Path, jobs: int) -> None:
    """Search all, print a row for each, write `search.md` into `folder`."""
    found = []
    for problem in read_yaml(PROBLEMS, "problems"):
        found.append(line(problem, jobs))
        print(found[-1].row, flush=True)
    load = os.getloadavg()[1]
    said = (
        f"All families, {Options.budget} simulations of each at most, in {jobs} processes "
        f"(load {load:.1f} on {os.cpu_count()} cores)."
    )
    lines = [
        "# Searches",
        "",
        f"`python -m tests.bench.search FOLDER`. {said}",
        "",
        verdict(found),
        "",
        f"| {' | '.join(HEAD)} |",
        f"|{'---|' * len(HEAD)}",
        *(one.row for one in found),
    ]
    write_text(folder / "search.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else os.cpu_count() or 1)
