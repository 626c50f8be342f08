"""A console whose reader may go away: `mopsim search ... | head` still writes the plan it was asked for."""

from rich.console import Console

from mopsim.common.outputs import unread


class LastingConsole(Console):
    """Falls silent where nobody reads it any more; rich's own ends the program there, without a word."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        unread(self.file)
