"""Runs as they were predicted before anything was learned from them (first_scores.csv).

python -m reports.validation.first_scores SCORES.json SET COMMIT adds what `mopsim validate --json` says of a
new set's runs. A run keeps its first score, and since the fifteenth set what was read as measured beside it.
Of runs whose case was mended against its page the commit that mended it stands beside the score: they say how
well a page was read, and nothing is learned from them.
"""

import argparse
import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mopsim.common import io
from mopsim.common.errors import MopError

TABLE = Path(__file__).with_name("first_scores.csv")
SAID = ("step_time_s", "peak_memory_bytes")
MEASURED = tuple(f"measured_{column}" for column in SAID)
COLUMNS = ("set", "commit", "run_id", "stack", *SAID, "mended", *MEASURED)


def first_scores(*, mended: bool = False) -> dict[str, dict[str, str]]:
    """By run, set after set: the stack that it was predicted by, seconds, and bytes as its source reads them;
    empty where it measured none; both as they were measured too, since the fifteenth set. mended: also of
    runs whose case was mended since."""
    rows = sorted(csv.DictReader(io.read_text(TABLE).splitlines()), key=lambda row: int(row["set"]))
    return {row["run_id"]: row for row in rows if mended or not row["mended"]}


def added(runs: Iterable[dict[str, Any]], name: str, commit: str) -> list[dict[str, str]]:
    """What is known of first scores with these, of grade A and B."""
    known = first_scores(mended=True) if TABLE.exists() else {}
    for run in runs:
        if run["status"] != "simulated" or run["quality"] not in "AB" or run["run_id"] in known:
            continue
        said, measured = (
            [
                f"{run[f'{kind}_{column}']:.6g}" if run.get(f"{column}_error") is not None else ""
                for column in SAID
            ]
            for kind in ("predicted", "measured")
        )
        if any(said):
            row = (name, commit, run["run_id"], run["stack"], *said, "", *measured)
            known[run["run_id"]] = dict(zip(COLUMNS, row, strict=True))
    return [*known.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scores", type=Path)
    parser.add_argument("set", type=int)
    parser.add_argument("commit")
    options = parser.parse_args()
    try:
        runs = json.loads(io.read_text(options.scores))["runs"]
    except (MopError, ValueError, KeyError) as error:
        parser.error(f"scores: {options.scores}: no result of mopsim validate --json: {error}")
    rows = added(runs, str(options.set), options.commit)
    lines = [",".join(COLUMNS), *(",".join(row[column] for column in COLUMNS) for row in rows)]
    io.write_text(TABLE, "\n".join(lines) + "\n")
    print(f"{len(rows)} runs in {TABLE}")


if __name__ == "__main__":
    main()
