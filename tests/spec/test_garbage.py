"""When Python looks for cycles of references: seldom in a command, as usual in the steps of a rank."""

import gc

import pytest

from mopsim.common import garbage
from mopsim.common.command_line import run_app


def test_a_command_is_looked_through_seldom() -> None:
    before, seen = gc.get_threshold(), []

    def command(arguments: list[str], standalone_mode: bool) -> int:
        seen.append(gc.get_threshold())
        return 0

    try:
        gc.set_threshold(700, 10, 10)
        with pytest.raises(SystemExit):
            run_app(command, "mopsim", ["one"])
        assert gc.get_threshold() == (700, 10, 10)
    finally:
        gc.set_threshold(*before)
    assert seen[0] > (10_000, 10, 10)


def test_what_is_imported_stays_and_what_comes_is_collected_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    before, frozen = gc.get_threshold(), []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(True))
    try:
        with garbage.collected_seldom():
            garbage.all_stays()
            assert gc.get_threshold() == garbage.USUAL
    finally:
        gc.set_threshold(*before)
    assert frozen == [True]
