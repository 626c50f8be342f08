"""Bytes reserved beside bytes allocated, as published runs print both: a constant, or a share?

Each source is predicted by the middle of the others (sources alike, `python -m reports.allocator.reserved`).
The rows are in reserved.csv: peaks in GiB of one rank each, with their source.
"""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median

ROWS = Path(__file__).with_name("reserved.csv")

Row = tuple[str, str, float, float]
"""Source, how its experts take routes (a source counts as its first row), allocated and reserved GiB."""


def read() -> dict[str, list[Row]]:
    """Rows by source."""
    by_source: dict[str, list[Row]] = {}
    with ROWS.open(encoding="utf-8", newline="") as lines:
        for line in csv.DictReader(lines):
            row = line["group"], line["experts"], float(line["allocated_gib"]), float(line["reserved_gib"])
            by_source.setdefault(row[0], []).append(row)
    return by_source


def share(row: Row) -> float:
    """Reserved over allocated."""
    return row[3] / row[2]


def gap(row: Row) -> float:
    """GiB beside what is allocated."""
    return row[3] - row[2]


def middle(sources: Sequence[Sequence[Row]], value: Callable[[Row], float]) -> float:
    """Of the sources, each by its own median."""
    return median(median(map(value, rows)) for rows in sources)


def left_out(by_source: dict[str, list[Row]]) -> dict[str, float]:
    """Mean relative error of what is reserved, by rule; each source predicted by the others."""
    errors: dict[str, list[float]] = {}
    for source, rows in by_source.items():
        others = [other for name, other in by_source.items() if name != source]
        alike = [other for other in others if other[0][1] == rows[0][1]] or others
        factor, constant, kin = middle(others, share), middle(others, gap), middle(alike, share)
        rules = {
            "what is allocated": (1.0, 0.0),
            "1.10 of it, as fixed segments": (1.10, 0.0),
            "one factor": (factor, 0.0),
            "a factor by experts": (kin, 0.0),
            "a constant": (1.0, constant),
        }
        for name, (times, plus) in rules.items():
            off = mean(abs((times * row[2] + plus) / row[3] - 1) for row in rows)
            errors.setdefault(name, []).append(off)
    return {name: mean(found) for name, found in errors.items()}


def main() -> None:
    by_source = read()
    print("| source | rows | experts | allocated, GiB | beside it, GiB | share of it |")
    print("|---|---:|---|---:|---:|---:|")
    for source, rows in sorted(by_source.items(), key=lambda item: median(map(share, item[1]))):
        sizes = f"{min(row[2] for row in rows):.0f} to {max(row[2] for row in rows):.0f}"
        gaps = f"{min(map(gap, rows)):.1f} to {max(map(gap, rows)):.1f}"
        shares = f"{min(map(share, rows)) - 1:.1%} to {max(map(share, rows)) - 1:.1%}"
        print(f"| {source} | {len(rows)} | {rows[0][1] or '-'} | {sizes} | {gaps} | {shares} |")
    for name, error in left_out(by_source).items():
        print(f"{name}: {error:.1%}")
    for kind in ("dropless", "none"):
        some = [rows for rows in by_source.values() if rows[0][1] == kind]
        print(f"{kind}: {len(some)} sources, {middle(some, share) - 1:.1%}, {middle(some, gap):.1f} GiB")


if __name__ == "__main__":
    main()
