"""Sentences of a template are those that Python asks for."""

import copy
import re
from pathlib import Path

from mopsim.report import sizing
from tests.together import together

ASKED = sorted(set(re.findall(r"SAID\.(\w+)", Path(sizing.__file__).read_text(encoding="utf-8"))))


@together(ASKED)
def test_every_sentence_that_is_asked_for_is_a_macro(macro: str) -> None:
    source = Path(sizing.__file__).with_name("templates") / sizing.SAID.name
    assert f"macro {macro}(" in source.read_text(encoding="utf-8")
    assert callable(getattr(sizing.SAID, macro))


def test_words_are_copied() -> None:
    """Names of Python's own protocols are no macros."""
    assert copy.copy(sizing.SAID).name == sizing.SAID.name
    assert not hasattr(sizing.SAID, "_none")
