"""Errors that a user can cause: a line each, which ends a command with exit code 2."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Rule = tuple[bool, str, str]
"""(what must hold, the dotted field, the rule where it does not)."""
Rules = Iterator[Rule]
_LONGEST_VALUE = 120
_LONGEST_LINE = 4000
MOST_LINES = 10
"""Mistakes of one input that are told."""


class MopError(Exception):
    """A user's mistake: shown as one printable line, exit code 2, never a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class MistakesError(MopError):
    """Several mistakes of one input, each a printable line of `lines`."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = [one_line(line) for line in lines]
        super().__init__("; ".join(told(self.lines)))

    def __reduce__(self) -> tuple[Any, ...]:
        """So that it crosses processes."""
        return MistakesError, (self.lines,)


class SpecError(MopError, ValueError):
    """A field of a spec breaks a rule: `field: value rule`.

    Also a ValueError, so that msgspec adds the outer path when a nested struct refuses itself.
    """

    def __init__(self, field: str, value: Any, rule: str) -> None:
        self.field, self.value, self.rule = field, value, rule
        super().__init__(f"{field}: {shown(value)} {rule}")

    def __reduce__(self) -> tuple[Any, ...]:
        """So that it crosses processes: an exception is otherwise remade from its message alone."""
        return SpecError, (self.field, self.value, self.rule)

    def within(self, prefix: str) -> "SpecError":
        """The same error, its field named from further out."""
        return SpecError(".".join(filter(None, (prefix, self.field))), self.value, self.rule)


class InnerError(SpecError):
    """A refusal of what a field holds, in the words of whoever refused it: `field: text`."""

    def __init__(self, text: str) -> None:
        field, _, rule = text.partition(": ")
        self.field, self.value, self.rule = field, None, rule
        MopError.__init__(self, text)

    def __reduce__(self) -> tuple[Any, ...]:
        return InnerError, (str(self),)

    def within(self, prefix: str) -> SpecError:
        return InnerError(f"{prefix}.{self}".lstrip("."))


def one_line(message: str) -> str:
    """`message` without line breaks; what a terminal would not show, or obey, is written as its escape."""
    if len(message) > _LONGEST_LINE:
        message = f"{message[:_LONGEST_LINE]}..."
    if message.isprintable():
        return message
    line = " ".join(part.strip() for part in message.split("\n"))
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def told(lines: Sequence[str]) -> list[str]:
    """The first MOST_LINES, and how many more there are."""
    more = len(lines) - MOST_LINES
    return [*lines[:MOST_LINES], *([f"and {more:,} more"] if more > 0 else [])]


def refuse(mistakes: Iterable[str]) -> None:
    """Raise MistakesError, each once, unless there are none; of one it is a MopError."""
    lines = list(dict.fromkeys(mistakes))
    if lines:
        raise MopError(lines[0]) if len(lines) == 1 else MistakesError(lines)


def shown(value: Any) -> str:
    """`value` as it stands in a message: its repr, cut where it is long."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 500:
        return f"an integer of {int(value.bit_length() * 0.30103) + 1:,} digits"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # endless digits or nesting inside of it
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def require_at_least(owner: Any, least: int, *fields: str) -> None:
    """Raise SpecError naming the first field of `owner` that is below `least`."""
    for field in fields:
        require(getattr(owner, field) >= least, field, getattr(owner, field), f"must be at least {least}")


BREAKS = ("Cc", "Cs", "Zl", "Zp")
"""Kinds of characters that end a line of text, or are none."""


def require_name(name: str, field: str = "name") -> None:
    """Raise SpecError unless `name` is one line of text: it stands in tables, messages and file names."""
    breaks = not name.isprintable() and any(unicodedata.category(one) in BREAKS for one in name)
    plain = bool(name.strip()) and not breaks and len(name) <= 200
    require(plain, field, name, "must be one line of text of at most 200 characters, not empty")


def require(condition: bool, field: str, value: Any, rule: str) -> None:
    """Raise SpecError(field, value, rule) unless `condition` holds."""
    if not condition:
        raise SpecError(field, value, rule)
