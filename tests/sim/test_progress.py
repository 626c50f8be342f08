"""A long command says how far it is, on a terminal or not."""

import io

import pytest
from rich.console import Console

from mopsim.commands import progress


def test_without_a_terminal_lines_come_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO())
    with progress.progress(console, "sweeping", 130) as shown:
        for done in range(1, 131):
            now[0] += 1.0
            shown(done, f"case {done}")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"mopsim: sweeping {n} of 130: case {n}" for n in (30, 60, 90, 120)]
    assert not console.file.getvalue()  # type: ignore[attr-defined]


def test_on_a_terminal_it_is_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    with progress.progress(console, "sizing", None) as shown:
        shown(0, "2 nodes")
    assert not capsys.readouterr().err
