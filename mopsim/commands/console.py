"""Where a command prints."""

from typing import Any

from mopsim.common.outputs import STDOUT


def human(json: str | None) -> Any:
    """A rich console: standard output, or standard error where standard output carries the JSON."""
    from rich.console import Console

    return Console(stderr=json == "-", highlight=False)


def say_written(console: Any, *paths: str | None) -> None:
    """'Written: a.yaml, b.json', of those that were asked for."""
    files = [path for path in paths if path and path != STDOUT]
    if files:
        console.print(f"Written: {', '.join(files)}", soft_wrap=True)


def say_plan(console: Any, path: str, runnable: bool) -> None:
    """What a plan that was written is for."""
    ask = (
        f"mopexec train --plan {path}"
        if runnable
        else f"mopsim export --plan {path}; mopexec does not run it"
    )
    console.print(f"Written: {path} ({ask})", soft_wrap=True)
