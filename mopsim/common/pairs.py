"""Options that mean something beside some others only: elsewhere they are refused, never ignored."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mopsim.common.app import Command
from mopsim.common.errors import MopError, shown

Given = Mapping[str, Any]
"""What was typed: value by option, as '--out'."""


class Pair(NamedTuple):
    """options: refused with `rule` where one is given and `meant`, asked with all that is given, is false."""

    options: tuple[str, ...]
    meant: Callable[[Given], bool]
    rule: str


def needs(one_of: str, *options: str) -> Pair:
    """`options` go with one of the options that `one_of` names, as '--runs, --cases'."""
    names = one_of.split(", ")
    return Pair(options, lambda given: any(map(given.get, names)), f"has no use without {' or '.join(names)}")


def apart(option: str, *others: str) -> Pair:
    """`others` do not go with `option`."""
    return Pair(others, lambda given: not given.get(option), f"has no use beside {option}")


class PairedCommand(Command):
    """A command whose options are held against its `pairs` when they are read."""

    pairs: tuple[Pair, ...] = ()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises MopError naming the option that would be ignored, its value and the rule."""
        rest = super().parse_args(ctx, args)
        given = self.typed(ctx)
        for options, meant, rule in self.pairs:
            for option in options:
                if option in given and not meant(given):
                    raise MopError(f"{option}: {_typed(given[option])}{rule}")
        return rest


def _typed(value: Any) -> str:
    """A value before a rule; nothing for a flag."""
    if isinstance(value, bool):
        return ""
    return f"{shown(', '.join(map(str, value)) if isinstance(value, list) else value)} "


def paired(*pairs: Pair) -> type[PairedCommand]:
    """The class of a command with these pairs, for `app.command(cls=...)`."""
    return type("PairedCommand", (PairedCommand,), {"pairs": pairs})
