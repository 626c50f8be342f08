"""docs/reference is made from the structs, is current, and says something of every field."""

import re
import sys
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from mopsim.validate import columns

DOCS = Path(__file__).parents[2] / "docs"
VALIDATE = Path(columns.__file__).parent


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """docs/generate.py, which is not installed."""
    sys.path.insert(0, str(DOCS))
    try:
        import generate
    finally:
        sys.path.remove(str(DOCS))
    return generate


def test_the_reference_is_current(generate: ModuleType) -> None:
    for name, text in generate.pages().items():
        assert (DOCS / "reference" / name).read_text(encoding="utf-8") == text, f"{name}: run make docs"


def test_every_field_has_a_meaning(generate: ModuleType) -> None:
    silent = {
        f"{kind.__name__}.{field.name}"
        for _, first in generate.PAGES.values()
        for kind in generate.structs(first)
        for field in msgspec.structs.fields(kind)
        if not generate.meanings(kind)[1].get(field.name)
    }
    assert not silent


def test_every_column_that_is_read_is_documented() -> None:
    """`row["x"]`, `row.get("x")`, `number(row, "x")` and `count(row, "x")` of mopsim.validate."""
    read = re.compile(
        r"(?:row\[|row\.get\(|(?:number|count|_get|_need|_published)\((?:\w+\.)*(?:row|filled), )"
        r'"([a-z_]+)"'
    )
    texts = [path.read_text(encoding="utf-8") for path in VALIDATE.rglob("*.py")]
    names = {name for text in texts for name in read.findall(text)}
    computed = {"reason", "date", "dated", "by_words", "names", "forced"}
    assert "step_time_s" in names
    known = {*columns.RUNS, *columns.MODELS, *columns.COMPONENTS}
    assert not names - known - computed
