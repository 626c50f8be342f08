"""Where a command prints."""

from typing import Any


def human(json: str | None) -> Any:
    """A rich console: standard output, or standard error where standard output carries the JSON."""
    from mopsim.common.console import LastingConsole

    return LastingConsole(stderr=json == "-", highlight=False)
