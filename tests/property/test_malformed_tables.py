"""One cell wrong in every column of every table: one printable line that names the column, or a refusal of
the row, and never a traceback."""

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path as File
from typing import Any

import pytest

from mopsim.common.errors import MopError
from mopsim.common.table import Row
from mopsim.validate.components import predict_components
from mopsim.validate.models import from_row, read_rows
from mopsim.validate.rows import read_case
from mopsim.validate.tables import UnsupportedError, read_components, read_runs
from tests.property.test_malformed import ALL, LONGEST, at_most

DATA = File(__file__).parents[1] / "sim" / "data"
DRAWN = 5
CELLS = (
    "", "x", "-1", "0", "1.5", "nan", "inf", "-inf", "1e400", "1e308", "5e-324", "9" * 5000, "0x10",
    str(2**62), "1,5", "a\nb", "\x1b[31m", "\u2028", "x" * 50_000, '"', "[1]", "{}", '{"a": 1}', "[[[" * 400,
    '{"a":' * 500, "unknown", "1e18", "1e-18", "natural", "²", "٣", "null", "none", "full",
)  # fmt: skip
WRONG: tuple[Any, ...] = (
    "x", -1, 0, 1.5, 1e308, 2**62, 10**30, 1e-300, None, True, [1], {"a": 1}, "9" * 5000,
)  # fmt: skip
COMPONENTS = (
    ("gemm", {"m": 4096, "n": 4096, "k": 4096, "precision": "bf16"}, "flops_per_s"),
    ("expert_dispatch", {"ep": 8, "expert_hidden": 4096, "hidden": 4096, "num_experts": 128,
     "pass": "forward", "precision": "bf16", "routing": "balanced", "tokens_per_rank": 32768,
     "top_k": 4}, "latency_s"),
)  # fmt: skip


def _first(name: str) -> list[Row]:
    with (DATA / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _write(file: File, row: Row) -> None:
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, row.keys())
        writer.writeheader()
        writer.writerow(row)


def _read(read: Callable[[], Any], what: str) -> str:
    """The line that `read` is refused with; '' where it is content."""
    try:
        with at_most(20):
            read()
    except (MopError, UnsupportedError) as error:
        line = str(error)
        assert line.isprintable(), f"{what}: {line[:300]!r}"
        assert len(line) <= 2 * LONGEST, f"{what}: {len(line)} characters"
        return line
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {str(error)[:200]}") from error
    return ""


def _cells(draw: random.Random) -> list[str]:
    return list(CELLS) if ALL else draw.sample(CELLS, DRAWN)


@pytest.mark.parametrize("index", range(4))
def test_a_cell_of_a_run(index: int, tmp_path: File) -> None:
    draw, file = random.Random(index), tmp_path / "runs.csv"
    rows, models = _first("golden_runs.csv"), read_rows(DATA / "golden_models.csv")
    row = draw.choice(rows)
    for column in row:
        for cell in _cells(draw):
            _write(file, {**row, column: cell})
            what = f"{column}: {cell[:20]!r}"
            line = _read(lambda: [read_case(one, models) for one in read_runs(file)], what)
            if cell in ("nan", "inf", "1e400", "²") and column in ("seq_len", "num_gpus", "tp", "pp"):
                assert column in line, f"{what}: {line}"


@pytest.mark.parametrize("index", range(3))
def test_a_cell_of_a_model(index: int, tmp_path: File) -> None:
    draw, file = random.Random(index), tmp_path / "models.csv"
    row = draw.choice(_first("golden_models.csv"))
    for column in row:
        for cell in _cells(draw):
            _write(file, {**row, column: cell})
            _read(lambda: [from_row(one) for one in read_rows(file).values()], f"{column}: {cell[:20]!r}")


@pytest.mark.parametrize(("component", "params", "metric"), COMPONENTS)
def test_a_cell_or_parameter_of_a_component(
    component: str, params: dict[str, Any], metric: str, tmp_path: File
) -> None:
    draw, file = random.Random(component), tmp_path / "components.csv"
    row = {
        "component": component, "system": "s", "gpu": "h200-sxm-141g", "num_gpus": "8",
        "params": json.dumps(params), "metric": metric, "value": "1", "outcome": "ok",
    }  # fmt: skip
    for column in row:
        for cell in _cells(draw):
            _write(file, {**row, column: cell})
            _read(lambda: predict_components(read_components(file)), f"{column}: {cell[:20]!r}")
    for name in params:
        for value in WRONG:
            _write(file, {**row, "params": json.dumps({**params, name: value})})
            _read(lambda: predict_components(read_components(file)), f"{name}: {str(value)[:20]}")
