"""What the JSON of a command is known by."""

from typing import Any

RESULT_KEYS = {
    "compare": frozenset({"strategies", "finding"}),
    "search": frozenset({"top", "candidates"}),
    "size": frozenset({"hardware", "deadline_s"}),
    "validate": frozenset({"runs", "summary"}),
    "context": frozenset({"lengths", "contenders", "cases"}),
    "simulate": frozenset({"step_time_s", "strategy"}),
}
"""By command, in this order: the first whose keys a result has made it."""


def made_by(data: Any) -> str:
    """The command whose --json this is, '' where it is of none."""
    keys = set(data) if isinstance(data, dict) else set()
    return next((command for command, known in RESULT_KEYS.items() if known <= keys), "")
