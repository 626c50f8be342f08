"""Writes docs/reference: every field of every file that a user writes, from the structs and their docstrings.

A struct's docstring says what a field means as `field: meaning`, up to the next field (`a, b: meaning` is of
both). `python docs/generate.py` writes the pages; with `--check` it fails where one is not current.
"""

import inspect
import re
import sys
import textwrap
import types
import typing
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec

import mopsim
from mopsim.spec import capability, hardware, model, plan, stack, strategy, training
from mopsim.validate import columns

HEAD = "<!-- Made by `make docs` from the structs and their docstrings: change those. -->"
OUT = Path(__file__).parent / "reference"
PAGES: dict[str, tuple[str, type[msgspec.Struct]]] = {
    "model": ("A network: `--model`, `mopsim/presets/*.yaml`.", model.ModelSpec),
    "hardware": ("A machine type: `--hardware`, `hardware_profiles/*.yaml`.", hardware.HardwareProfile),
    "strategy": ("A strategy: `--strategy`, and part of a plan.", strategy.Strategy),
    "stack": ("A software stack: what a program makes of a strategy.", stack.Stack),
    "training": ("What one step trains on; part of a plan.", training.TrainSpec),
    "plan": ("A plan, as `mopsim search --plan` writes it and `mopexec train` runs it.", plan.Plan),
    "measurement": ("`measurement.yaml`: from `mopexec train` to `mopsim calibrate`.", plan.Measurement),
}
"""What each page is of."""


def shown(kind: Any) -> str:
    """A type as a reader of YAML knows it: `device` or `host`; integer; list of text."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(f"`{value}`" if value != "" else "empty" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(shown(one) for one in inner if one is not msgspec.UnsetType)
    if origin in (tuple, list):
        return f"list of {shown(inner[0])}"
    if origin is dict:
        return f"mapping of {shown(inner[0])} to {shown(inner[1])}"
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return f"[{kind.__name__}](#{kind.__name__.lower()})"
    if isinstance(kind, typing.TypeAliasType if hasattr(typing, "TypeAliasType") else ()):
        return shown(kind.__value__)
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def default(field: msgspec.structs.FieldInfo) -> str:
    """Its default as YAML would have it; `required` where there is none."""
    if field.default_factory is not msgspec.NODEFAULT:
        value = field.default_factory()
    elif field.default is not msgspec.NODEFAULT:
        value = field.default
    else:
        return "required"
    if isinstance(value, msgspec.Struct):
        return "its defaults"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if value in ("", (), [], {}, msgspec.UNSET):
        return "empty"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def meanings(kind: type[msgspec.Struct]) -> tuple[str, dict[str, str]]:
    """(what the struct is, what each field means) from its docstring."""
    names = [field.name for field in msgspec.structs.fields(kind)]
    text = " ".join((kind.__doc__ or "").split())
    word = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    heads = list(re.finditer(rf"\b((?:{word})(?:, (?:{word}))*): ", text))
    ends = [head.start() for head in heads[1:]] + [len(text)] * bool(heads)
    found: dict[str, str] = {}
    for head, end in zip(heads, ends, strict=True):
        meaning = text[head.end() : end].strip().rstrip(";,")
        for name in head.group(1).split(", "):
            found[name] = " ".join(filter(None, (found.get(name, ""), meaning)))
    return text[: heads[0].start()].strip() if heads else text, found


def structs(kind: type[msgspec.Struct]) -> list[type[msgspec.Struct]]:
    """The struct and those inside it, each once, in the order of their fields."""
    found = [kind]
    for field in msgspec.structs.fields(kind):
        for inner in _inside(field.type):
            found += [one for one in structs(inner) if one not in found]
    return found


def _inside(kind: Any) -> list[type[msgspec.Struct]]:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return [kind]
    return [one for inner in get_args(kind) for one in _inside(inner)]


def section(kind: type[msgspec.Struct]) -> str:
    """The table of one struct."""
    what, found = meanings(kind)
    rows = [
        f"| `{field.name}` | {shown(field.type)} | {default(field)} | {_cell(found.get(field.name, ''))} |"
        for field in msgspec.structs.fields(kind)
    ]
    head = ["| field | type | default | meaning |", "|---|---|---|---|"]
    return "\n".join([f"## {kind.__name__}", "", what, "", *head, *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


TABLES = {
    "runs": ("Measured runs: `mopsim validate --runs FILE.csv`.", columns.RUNS),
    "models": ("The networks of measured runs: `mopsim validate --models FILE.csv`.", columns.MODELS),
    "components": ("Measured components: `mopsim validate --components FILE.csv`.", columns.COMPONENTS),
}
"""What each page of a CSV is of."""
CELLS = (
    "An empty cell, or `unknown`, means that the source does not say. A run or network that is not fully "
    "stated is refused by name."
)


def table(name: str) -> str:
    """The page of a CSV's columns."""
    what, known = TABLES[name]
    rows = [
        f"| `{column}` | {'yes' if one.needed else 'no'} | {_cell(one.meaning + _choices(one))} |"
        for column, one in known.items()
    ]
    head = ["| column | in every header | meaning |", "|---|---|---|"]
    return "\n\n".join([HEAD, f"# {name.capitalize()}", what, CELLS, "\n".join([*head, *rows])]) + "\n"


def _choices(column: columns.Column) -> str:
    """' One of a, b or c.', of what a cell may say."""
    joined = f"some of {', '.join(column.words)} joined by +" if column.words else ""
    said = [*column.values, *([joined] if joined else [])]
    return f" One of {', '.join(said[:-1])} or {said[-1]}." if said else ""


CAPABILITY = "Which values of each field are simulated, run by each runtime of mopexec, and exported."


def capabilities() -> str:
    """The page of the capability table: a row for each field, a column for each side."""
    notes: dict[str, int] = {}
    head = [f"| field | {' | '.join(capability.SIDES)} |", f"|---{'|---' * len(capability.SIDES)}|"]
    rows = []
    for path, row in capability.ROWS.items():
        cells = [_capability(row.cells[side], notes) for side in capability.SIDES]
        name = "every other `stack` field" if row.usual and path.startswith("stack.") else f"`{path}`"
        rows.append(f"| {name} | {' | '.join(cells)} |")
    rows = list(dict.fromkeys(rows))
    meaning = (
        "*all*: every value that the field can have. A list: these values; others are refused by name. *-*: "
        "the field has no part in what this side does. A field that has nothing to act on in a job (an order "
        "of groups where there is one) is passed over. Relations between two fields are in "
        "`mopsim/spec/capability/rules.yaml`. Numbers are notes below the table."
    )
    told = [f"{number}. {note}" for note, number in notes.items()]
    body = "\n".join([*head, *rows])
    return "\n\n".join([HEAD, "# Capability", CAPABILITY, meaning, body, "\n".join(told)]) + "\n"


def _capability(cell: capability.Cell, notes: dict[str, int]) -> str:
    """One cell; its reason becomes a note with a number."""
    values = ", ".join(f"`{value!r}`" for value in cell.values or ())
    text = values or ("all" if cell.reads else "-")
    return f"{text} ({notes.setdefault(cell.why, len(notes) + 1)})" if cell.why else text


def interface() -> str:
    """The page of the Python API: a signature and a docstring for each name."""
    functions = [name for name in mopsim.__all__ if inspect.isfunction(getattr(mopsim, name))]
    classes = [name for name in mopsim.__all__ if inspect.isclass(getattr(mopsim, name))]
    parts = [HEAD, "# Python API", inspect.cleandoc(mopsim.__doc__ or "").split("\n\n")[-1]]
    for name in functions:
        one = getattr(mopsim, name)
        call = f"```\nmopsim.{name}({_arguments(one)})\n```"
        parts += [f"## {name}", call, inspect.getdoc(one) or ""]
    for name in classes:
        one = getattr(mopsim, name)
        inner = [base for base in one.__mro__[1:] if base.__module__.startswith("mopsim.")]
        own = [one, *(base for base in inner if base.__name__ not in classes)]
        members = dict.fromkeys(member for base in own for member in vars(base))
        public = [member for member in members if not member.startswith("_")]
        methods = [member for member in public if callable(getattr(one, member)) or _is_property(one, member)]
        lines = [f"- `{member}`: {_first_line(getattr(one, member))}" for member in methods]
        parts += [f"## {name}", inspect.getdoc(one) or "", "\n".join(lines)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _arguments(function: Any) -> str:
    """The parameters with their defaults, without types."""
    plain = [one.replace(annotation=one.empty) for one in inspect.signature(function).parameters.values()]
    text = str(inspect.Signature(plain))[1:-1]
    return "\n    " + "\n    ".join(textwrap.wrap(text, 100)) + "\n" if len(text) > 100 else text


def _is_property(kind: type, member: str) -> bool:
    return isinstance(inspect.getattr_static(kind, member), property | cached_property)


def _first_line(member: Any) -> str:
    """The first sentence of a docstring."""
    text = " ".join((inspect.getdoc(member) or "").split())
    return text.partition(". ")[0].rstrip(".") + "." if text else ""


def pages() -> dict[str, str]:
    """The text of each page, by file name."""
    taken: dict[type[msgspec.Struct], str] = {kind: name for name, (_, kind) in PAGES.items()}
    made = {}
    for name, (what, kind) in PAGES.items():
        inner = [one for one in structs(kind) if one is kind or taken.get(one) is None]
        text = "\n\n".join([HEAD, f"# {name.capitalize()}", what, *map(section, inner)]) + "\n"
        for other, page in taken.items():
            if page != name:
                text = text.replace(f"](#{other.__name__.lower()})", f"]({page}.md)")
        made[f"{name}.md"] = text
    made |= {f"{name}.md": table(name) for name in TABLES} | {"api.md": interface()}
    made["capability.md"] = capabilities()
    index = [f"| [{name}]({name}.md) | {what} |" for name, (what, _) in (PAGES | TABLES).items()]
    index.append(f"| [capability](capability.md) | {CAPABILITY} |")
    index.append("| [api](api.md) | What `import mopsim` offers. |")
    lines = [HEAD, "", "# Reference", "", "| page | what it is of |", "|---|---|", *index]
    return made | {"README.md": "\n".join(lines) + "\n"}


def main(arguments: list[str]) -> int:
    """Write the pages, or with --check return 1 and name those that are not current."""
    stale = []
    for name, text in pages().items():
        path = OUT / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if "--check" not in arguments:
                path.write_text(text, encoding="utf-8")
    if stale and "--check" in arguments:
        print(f"docs/reference is not current: {', '.join(stale)} (make docs)", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
