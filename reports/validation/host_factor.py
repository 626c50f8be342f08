"""What layers of Transformer Engine take of a host with a device, times what they took on a CPU.

python -m reports.validation.host_factor [--json FILE] simulates the published runs (grades A and B) at
several factors in place of `on_a_device` of mopsim/graph/host_costs.yaml: those of such layers whose step a
host half as slow again makes longer, and the others once (an hour on one core; it says how far it is). It
prints the error and the bias of step time by factor, sources alike, and which factor all other sources give
each. --read FILE prints what was written before (reports/host/on_a_device.json).
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from mopsim.common import io
from mopsim.graph.host_costs import ON_A_DEVICE
from mopsim.spec.stacks import load_stack
from mopsim.validate.case import Case, read_cases
from mopsim.validate.simulated import simulate_case

CASES, LAYERS = Path(__file__).parent / "cases", "transformer_engine"
INSTALLED = ON_A_DEVICE[LAYERS]
FACTORS = (1.0, 1.25, 1.3)
GRID = tuple(round(1 + 0.05 * step, 2) for step in range(10))
SLOWER, MOVES, NEARER = 1.5, 1.004, 0.004
COLUMNS = ("moved", "experts", "all")


@dataclass(frozen=True)
class Row:
    """A run: relative errors of its step time by factor; one alone where none matters."""

    source: str
    experts: bool
    errors: tuple[float, ...]

    def at(self, factor: float, factors: Sequence[float]) -> float:
        """Between the factors that were simulated and beyond them by a straight line from the first."""
        if len(self.errors) == 1:
            return self.errors[0]
        above = min((place for place in range(1, len(factors)) if factors[place] >= factor), default=-1)
        share = (factor - factors[0]) / (factors[above] - factors[0])
        return self.errors[0] + share * (self.errors[above] - self.errors[0])


def played(case: Case) -> Row | None:
    """A run at every factor that moves it. None: it was refused."""
    theirs, measured = load_stack(case.strategy.stack).host.layers == LAYERS, case.measured.step_time
    assert measured
    ON_A_DEVICE[LAYERS] = FACTORS[0]
    result = simulate_case(case, paced=theirs)
    if result.error:
        return None
    seconds = [result.step_time]
    if result.paces:
        own, (issues, steps) = case.profile().host.cpu_launch_time, np.array(result.paces).T
        assert own
        slower, base = np.interp([SLOWER * own.si, own.si], issues, steps)
        for factor in FACTORS[1:] if slower >= MOVES * base else ():
            ON_A_DEVICE[LAYERS] = factor
            seconds.append(simulate_case(case, paced=False).step_time)
    errors = tuple(one / measured - 1 for one in seconds)
    return Row(case.source.name, case.network().num_local_experts > 1, errors)


def by_source(rows: Sequence[Row], factors: Sequence[float]) -> dict[str, Any]:
    """Mean error and bias of each source at every factor of GRID, of its networks with experts too."""
    some: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        some[row.source].append(row)
    found: dict[str, Any] = {}
    for source, own in sorted(some.items()):
        moves = any(len(row.errors) > 1 for row in own)
        found[source] = {"rows": len(own), "moved_rows": sum(len(row.errors) > 1 for row in own)}
        for name, few in (("all", own), ("experts", [row for row in own if row.experts])):
            if not few:
                continue
            wanted = GRID if moves and name == "all" else tuple(factors) if moves else GRID[:1]
            found[source][name] = {}
            for factor in wanted:
                errors = [row.at(factor, factors) for row in few]
                found[source][name][str(factor)] = {
                    "error": round(fmean(map(abs, errors)), 5),
                    "bias": round(fmean(errors), 5),
                }
    return found


def of(source: dict[str, Any], factor: float, part: str = "all") -> dict[str, float]:
    """Error and bias of a source at a factor."""
    by_factor = source[part]
    found: dict[str, float] = by_factor.get(str(factor)) or by_factor[str(GRID[0])]
    return found


def summary(sources: dict[str, Any], factors: Sequence[float]) -> dict[str, Any]:
    """By factor; what the others give each source that moves; how many are nearer and further off at what is
    installed than at the first factor, and the mean difference with its 95 % (sources drawn again)."""
    moved = {name: one for name, one in sources.items() if one["moved_rows"]}
    parts = {
        "moved": [(one, "all") for one in moved.values()],
        "experts": [(one, "experts") for one in sources.values() if "experts" in one],
        "all": [(one, "all") for one in sources.values()],
    }
    table = {
        str(factor): {
            name: {key: fmean(of(one, factor, part)[key] for one, part in some) for key in ("error", "bias")}
            for name, some in parts.items()
        }
        for factor in factors
    }
    errors = np.array([[of(one, factor)["error"] for factor in GRID] for one in moved.values()])
    given = (errors.sum(axis=0) - errors).argmin(axis=1)
    change = np.array([of(one, INSTALLED)["error"] - of(one, GRID[0])["error"] for one in moved.values()])
    drawn = np.random.default_rng(0).choice(change, (20000, len(change))).mean(axis=1)
    return {
        "sources": {name: len(some) for name, some in parts.items()},
        "table": table,
        "given_by_the_others": {
            str(GRID[one]): count for one, count in sorted(Counter(given.tolist()).items())
        },
        "error_with_what_the_others_give": errors[range(len(given)), given].mean(),
        "change": {"mean": change.mean(), "interval": np.percentile(drawn, [2.5, 97.5]).tolist()},
        "nearer": int((change < -NEARER).sum()),
        "further_off": int((change > NEARER).sum()),
    }


def printed(found: dict[str, Any]) -> None:
    """The table (error and bias), and what is said below it."""
    print("factor " + "".join(f"{name + ' (' + str(found['sources'][name]) + ')':>20}" for name in COLUMNS))
    for factor, row in found["table"].items():
        cells = (f"{row[name]['error']:11.2%} {row[name]['bias']:+8.2%}" for name in COLUMNS)
        print(f"{factor:7}" + "".join(cells))
    low, high = found["change"]["interval"]
    print(f"given by the others: {found['given_by_the_others']}", end="")
    print(f", error with it {found['error_with_what_the_others_give']:.2%}")
    print(f"change of the error {found['change']['mean']:+.2%} ({low:+.2%} to {high:+.2%}); ", end="")
    print(f"nearer by {NEARER:.1%} or more: {found['nearer']}, further off: {found['further_off']}")


def main() -> None:
    """Simulate, or read, and print."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--sources", nargs="*", help="names of files in cases/, without .jsonl (default: all)")
    asked.add_argument("--json", help="write the result there")
    asked.add_argument("--read", type=Path, help="print this result")
    options = asked.parse_args()
    if options.read:
        printed(json.loads(io.read_text(options.read)))
        return
    names = options.sources or sorted(path.stem for path in CASES.glob("*.jsonl"))
    every = [case for name in names for case in read_cases(CASES / f"{name}.jsonl")]
    cases = [case for case in every if case.quality in "AB" and case.measured.step_time]
    rows = []
    for place, case in enumerate(cases, 1):
        rows += [row for row in [played(case)] if row]
        if place % 20 == 0 or place == len(cases):
            print(f"{place} of {len(cases)} runs", flush=True)
    sources = by_source(rows, FACTORS)
    found = summary(sources, FACTORS)
    printed(found)
    if options.json:
        io.write_json(options.json, found | {"by_source": sources})


if __name__ == "__main__":
    main()
