"""A user's CSV: what is none is one line that names file and line or column."""

from pathlib import Path

import pytest

from mopsim.common.errors import MopError
from mopsim.common.table import SURPLUS, read_table

BROKEN = [
    (b"", "has no column 'a'"),
    (b"\n\n", "has no column 'a'"),
    (b"b,c\n1,2\n", "has no column 'a'; columns found: b, c"),
    (b"a;b\n1;2\n", "cells must be separated by commas, not ';'"),
    (b"a,b,b\n1,2,3\n", "column 'b' appears twice"),
    (b'a,b\n1,2\n"3,4\n', "line 3 is not CSV: unexpected end of data"),
    (b'a,b\n"1"x,2\n', "line 2 is not CSV: "),
    (b"a,b\n" + b"1" * 200_000 + b",2\n", "line 2 is not CSV: field larger than field limit"),
    ("a,b\né,1\n".encode("latin1"), "is not UTF-8 text"),
]


@pytest.mark.parametrize(("content", "says"), BROKEN)
def test_what_is_no_csv_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_bytes(content)
    with pytest.raises(MopError) as refused:
        read_table(path, ("a",), "runs")
    assert str(refused.value).startswith(f"runs: {path}: ")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_short_rows_are_filled_and_empty_ones_left_out(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbf" + b'a, b\r\n 1 , "2\n3"\r\n\r\n,\r\n4\r\n')
    assert read_table(tmp_path / "x.csv", "ab", "runs") == [{"a": "1", "b": "2\n3"}, {"a": "4", "b": ""}]


def test_a_row_with_too_many_cells_is_marked(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2,3\n4,5\n")
    wide, well = read_table(tmp_path / "x.csv", "ab", "runs")
    assert (wide[SURPLUS], well) == ("line 2", {"a": "4", "b": "5"})
