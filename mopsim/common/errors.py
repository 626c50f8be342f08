"""Errors that a user can cause. Each prints as one line and ends a command with exit code 2."""

from typing import Any


class MopError(Exception):
    """A user's mistake: shown as one line, exit code 2, never a traceback."""


class SpecError(MopError, ValueError):
    """A field of a spec breaks a rule: `field: value rule`.

    Also a ValueError, so that msgspec adds the outer path when a nested struct refuses itself.
    """

    def __init__(self, field: str, value: Any, rule: str) -> None:
        self.field, self.value, self.rule = field, value, rule
        super().__init__(f"{field}: {value!r} {rule}")

    def __reduce__(self) -> tuple[Any, ...]:
        """So that it crosses processes: an exception is otherwise remade from its message alone."""
        return SpecError, (self.field, self.value, self.rule)

    def within(self, prefix: str) -> "SpecError":
        """The same error, its field named from further out."""
        return SpecError(f"{prefix}.{self.field}" if prefix else self.field, self.value, self.rule)


def require_at_least(owner: Any, least: int, *fields: str) -> None:
    """Raise SpecError naming the first field of `owner` that is below `least`."""
    for field in fields:
        require(getattr(owner, field) >= least, field, getattr(owner, field), f"must be at least {least}")


def require_name(name: str, field: str = "name") -> None:
    """Raise SpecError unless `name` is one line of text: it stands in tables, messages and file names."""
    plain = bool(name.strip()) and len(name.splitlines()) == 1 and min(name) >= " "
    require(plain, field, name, "must be one line of text, not empty")


def require(condition: bool, field: str, value: Any, rule: str) -> None:
    """Raise SpecError(field, value, rule) unless `condition` holds."""
    if not condition:
        raise SpecError(field, value, rule)
