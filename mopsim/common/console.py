"""A console whose reader may go away: `mopsim search ... | head` still writes the plan it was asked for."""

import os
import sys

from rich.console import Console


class LastingConsole(Console):
    """Falls silent where standard output is closed; rich's own ends the program there, without a word."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
