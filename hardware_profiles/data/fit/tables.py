"""The measured tables as arrays: gzipped or plain CSV, columns checked."""

import csv
import gzip
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mopsim.common.errors import MopError
from mopsim.common.io import read_text

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Residuals:
    """|log(predicted / measured)| of a fit: rows, median, 90th percentile, and the mean signed log error."""

    rows: int
    median: float
    p90: float
    bias: float

    @staticmethod
    def of(errors: Array) -> "Residuals":
        """Statistics of signed log errors."""
        size = np.abs(errors)
        return Residuals(
            len(errors), float(np.median(size)), float(np.quantile(size, 0.9)), float(np.mean(errors))
        )

    def __str__(self) -> str:
        return f"{self.rows} rows, median {self.median:.1%}, p90 {self.p90:.1%}, bias {self.bias:+.1%}"


def read_csv(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows of a CSV (.csv or .csv.gz). Raises MopError naming the file and a missing column."""
    if path.suffix == ".gz":
        try:
            text = gzip.decompress(path.read_bytes()).decode()
        except FileNotFoundError:
            raise MopError(f"{path}: no such file") from None
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise MopError(f"{path}: is not gzipped text: {error}") from None
    else:
        text = read_text(path)
    reader = csv.DictReader(io.StringIO(text))
    for column in columns:
        if column not in (reader.fieldnames or []):
            raise MopError(
                f"{path}: has no column {column!r}; columns found: {', '.join(reader.fieldnames or [])}"
            )
    return list(reader)


def column(rows: list[dict[str, str]], name: str) -> Array:
    """One column as floats. Raises MopError naming the value that is not a number."""
    try:
        return np.array([float(row[name]) for row in rows], dtype=np.float64)
    except ValueError as error:
        raise MopError(f"column {name!r}: {error}") from None


def params(row: dict[str, str]) -> dict[str, Any]:
    """The JSON of a components row."""
    return dict(json.loads(row["params"]))


def round_to(value: float, digits: int = 4) -> float:
    """`value` at `digits` significant digits: fits are not known better."""
    return float(f"{value:.{digits}g}")
