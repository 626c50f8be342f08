"""How far a long command is: a bar on a terminal, a line on standard error now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

EVERY = 30.0
"""Seconds between lines."""

Shown = Callable[[int, str], None]
"""Told how many are done, and of what one may want to know."""


@contextmanager
def progress(console: Console, what: str, total: int | None) -> Iterator[Shown]:
    """what: is being done. total: of them; None where it is not known."""
    if console.is_terminal:
        from rich.progress import Progress

        with Progress(console=console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done, text: bar.update(task, completed=done, description=text or what)
        return
    began = said = time.monotonic()

    def line(done: int, text: str) -> None:
        nonlocal said
        if time.monotonic() - said >= EVERY:
            said = time.monotonic()
            far = f" {done} of {total}" if total else ""
            more = f": {text}" if text else f", running for {said - began:.0f} s"
            print(f"mopsim: {what}{far}{more}", file=sys.stderr, flush=True)

    yield line


@contextmanager
def writing(console: Console, out: str | None) -> Iterator[None]:
    """While a report is drawn into `out`: said on a terminal, which would show nothing for as long."""
    if out and console.is_terminal:
        with console.status(f"writing {escape(out)}"):
            yield
    else:
        yield
