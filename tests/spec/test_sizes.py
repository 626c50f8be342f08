"""A file holds one concept, a function fits a screen."""

import ast
from pathlib import Path

import pytest

FILES = sorted((*Path("mopsim").rglob("*.py"), *Path("mopexec").rglob("*.py")))
LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 400, 60


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_and_its_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LINES_OF_A_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < LINES_OF_A_FUNCTION, node.name
