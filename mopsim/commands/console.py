"""Where a command prints."""

from typing import Any


def human(json: str | None) -> Any:
    """A rich console: standard output, or standard error where standard output carries the JSON."""
    from rich.console import Console

    return Console(stderr=json == "-", highlight=False)
