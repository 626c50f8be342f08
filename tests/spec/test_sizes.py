"""A file holds one concept, a function fits a screen."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 400, 60


@pytest.mark.parametrize("package", ["mopsim", "mopexec"])
def test_files_and_their_functions_are_short(package: str) -> None:
    assert not [long for path in sorted(Path(package).rglob("*.py")) for long in _long(path)]


def _long(path: Path) -> Iterator[str]:
    """The file, and functions of it, that are too long."""
    text = path.read_text(encoding="utf-8")
    if text.count("\n") > LINES_OF_A_FILE:
        yield f"{path}: {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= LINES_OF_A_FUNCTION:
            yield f"{path}: {node.name}"
