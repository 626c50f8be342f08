"""The commands of both packages: each option once; what a command reads is known where it writes."""

import shutil
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import typer
import typer.main
from typer.core import TyperCommand, TyperGroup

from mopsim.common.errors import MopError, shown
from mopsim.common.outputs import protected

READS = {
    "--assume", "--capex", "--cases", "--components", "--data", "--eval-data", "--hardware", "--init-from",
    "--measurements", "--model", "--models", "--near", "--plan", "--price", "--profile", "--routing", "--run",
    "--runs", "--sealed", "--sites", "--stack", "--strategy", "--tokenizer", "MORE", "OPTIONS", "RESULT",
}  # fmt: skip
"""Options and arguments whose values may be files that are read; a command that writes one of them says so to
check_outputs."""


def written(param: Any) -> str:
    """A parameter as it is written: '--out', or 'RESULT' for an argument."""
    name = str(param.opts[0])
    return name if name.startswith("-") else name.upper()


class _Fitting:
    """What its help says is no wider than the terminal, but for a name: by itself click takes 50 columns at
    least."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.width = max(min(shutil.get_terminal_size().columns, 80) - 2, 20)
        formatter.write_dl = partial(formatter.write_dl, col_max=min(30, formatter.width // 2 - 4))
        super().format_help(ctx, formatter)  # type: ignore[misc]


class Commands(_Fitting, TyperGroup):
    """An app or a group of commands."""


class Command(_Fitting, TyperCommand):
    """A command that refuses an option given twice, and whose outputs may not be files that it reads."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises MopError for an option that has a value already, unless its values are a list, and for a
        number that only a programmer reads as one: 1_0. A flag that is only set may be set again."""
        seen: list[Any] = []
        typed, _, order = self.make_parser(ctx).parse_args(list(args))
        for param in order:
            only_set = getattr(param, "is_flag", False) and not param.secondary_opts
            if param in seen and not (param.multiple or only_set):
                raise MopError(f"{'/'.join([*param.opts, *param.secondary_opts])}: is given twice")
            seen.append(param)
        rest = super().parse_args(ctx, args)
        for param in seen:
            if type(ctx.params.get(param.name)) in (int, float) and "_" in str(typed.get(param.name)):
                raise MopError(f"{param.opts[0]}: {shown(typed[param.name])} is not a number")
        return rest

    def get_short_help_str(self, limit: int = 0) -> str:
        """The whole first sentence, which a group's help wraps."""
        return super().get_short_help_str(1000)

    def invoke(self, ctx: Any) -> Any:
        """Run the command, its inputs protected."""
        values = {name: value for name, value in self.typed(ctx).items() if name in READS}
        with protected(values):
            return super().invoke(ctx)

    def typed(self, ctx: Any) -> dict[str, Any]:
        """What was typed: value by option or argument."""
        return {
            written(param): ctx.params[param.name]
            for param in self.params
            if param.name and getattr(ctx.get_parameter_source(param.name), "name", "") == "COMMANDLINE"
        }


class App(typer.Typer):
    """A typer app whose commands are of that kind. Help, its own and theirs, is plain text: typer's tables
    cut an option's name where they are narrow."""

    def __init__(self, **given: Any) -> None:
        super().__init__(rich_markup_mode=None, cls=Commands, **given)

    @cached_property
    def parser(self) -> Any:
        """The commands with their options, made once in a process: those of mopsim take 12 ms."""
        return typer.main.get_command(self)

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self.parser(*given, **named)

    def command(
        self, name: str | None = None, *, cls: type[TyperCommand] | None = None, **given: Any
    ) -> Callable[[Any], Any]:
        """Register a command."""
        return super().command(name, cls=cls or Command, **given)
