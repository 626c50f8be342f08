"""Commands as a table: commands.toml of a package says what each is called and takes, a module runs it."""

import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer

from mopsim.common.app import App, Command

KINDS: dict[str, Any] = {"str": str, "int": int, "float": float, "bool": bool, "Path": Path}
Parsers = Mapping[str, Callable[[str], Any]]
Said = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Option:
    """kind: type of its value (`is`); of: words that it may be; many: it may be given several times. default:
    without one it is needed, unless it is optional, None then. flag: where it is not the name's own. parser:
    by name, what reads it. argument: it has no flag."""

    help: str
    kind: str = "str"
    of: tuple[str, ...] = ()
    many: bool = False
    optional: bool = False
    default: Any = Parameter.empty
    flag: str = ""
    min: float | None = None
    max: float | None = None
    metavar: str | None = None
    parser: str = ""
    hidden: bool = False
    show_default: bool = True
    argument: bool = False

    def parameter(self, name: str, parsers: Parsers) -> Parameter:
        """Of a function that typer reads."""
        kind: Any = Literal[tuple(self.of)] if self.of else KINDS[self.kind]
        kind = list[kind] if self.many else kind
        kind = Optional[kind] if self.optional else kind  # noqa: UP045
        said: dict[str, Any] = {
            "help": self.help, "min": self.min, "max": self.max, "metavar": self.metavar,
            "parser": parsers.get(self.parser), "hidden": self.hidden, "show_default": self.show_default,
        }  # fmt: skip
        flags = (self.flag,) if self.flag else ()
        info = typer.Argument(**said) if self.argument else typer.Option(*flags, **said)
        default = None if self.optional else self.default
        return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


@dataclass(frozen=True, kw_only=True)
class CommandSaid:
    """runs: the module that runs it, where that is not of its name. hands_on: options that it does not know
    are for another command."""

    help: str
    options: dict[str, Option]
    runs: str = ""
    hands_on: bool = False


def commands_of(
    package: str, words: Mapping[str, str] | None = None, more: Mapping[str, Said] | None = None
) -> dict[str, CommandSaid]:
    """The commands of a package. words: for those in braces in helps. more: further options of several
    commands."""
    text = files(package).joinpath("commands.toml").read_text("utf-8")
    for word, said in (words or {}).items():
        text = text.replace(f"{{{word}}}", said)
    read = tomllib.loads(text)
    known = read["options"] | (more or {})
    return {
        name: CommandSaid(**one | {"options": _options(one["options"], known)})
        for name, one in read["commands"].items()
    }


def _options(listed: Iterable[Any], known: Mapping[str, Said]) -> dict[str, Option]:
    """A command's, by name. listed: lists of names of `known` ones, and tables of its own, which may be
    `like` one of those but for what they say."""
    found = {}
    for some in listed:
        for name in some:
            own = some[name] if isinstance(some, dict) else {"like": name}
            said = dict(known.get(own.get("like", ""), {}))
            if "default" in own or "optional" in own:
                said.pop("optional", None)
                said.pop("default", None)
            said |= own
            said.pop("like", None)
            found[name] = Option(kind=said.pop("is", "str"), **said)
    return found


def register(
    app: App,
    name: str,
    said: CommandSaid,
    run: Callable[[str, dict[str, Any]], int | None],
    cls: type[Command] | None = None,
    parsers: Parsers | None = None,
) -> None:
    """Add a command to an app. run: is told the module and the values by option; returns the exit code."""

    def call(**values: Any) -> None:
        raise typer.Exit(run(said.runs or name, values) or 0)

    parameters = [one.parameter(key, parsers or {}) for key, one in said.options.items()]
    call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {one.name: one.annotation for one in parameters}
    more = {"context_settings": {"ignore_unknown_options": True}} if said.hands_on else {}
    app.command(name, cls=cls, help=said.help, **more)(call)
