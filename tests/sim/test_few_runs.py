"""`mopsim validate` of a handful of runs: one table, a line for each."""

from pathlib import Path

from mopsim.report.validation_tables import FEW, tables
from mopsim.validate.case import read_cases
from mopsim.validate.run import validate

CASES = Path(__file__).parents[2] / "reports/validation/cases/cclbench-llama8b.jsonl"


def test_a_run_alone_is_a_line_and_no_means(tmp_path: Path) -> None:
    """One run had six tables, with labels like bf16_fp16_AB."""
    path = tmp_path / "one.jsonl"
    path.write_text(CASES.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    found = validate(read_cases(path))
    assert len(found.scored) == 1 <= FEW
    (grid,) = tables(found, [])
    assert [row[1] for row in grid.rows] == ["step time", "P(fits)"]
    assert grid.rows[0][-1].endswith("%")
