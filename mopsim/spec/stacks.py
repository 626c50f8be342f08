"""Stacks by name or by YAML file: entries with their sources, `extends` resolved.

    name: my-fork
    version: "1.4 (2026-10)"
    extends: torchtitan
    kernels:
      source: my_fork/model.py          # of every entry of the section that names none of its own
      norm: fused
      rotary: {value: fused, source: my_fork/kernels/rotary.py}

An entry at the top (`runtime`, `communication_share`, ...) has the `source` at the top. An entry without a
source is refused, so that a reader can check each.
"""

from collections.abc import Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from mopsim.common.arguments import named
from mopsim.common.errors import MopError, shown
from mopsim.common.io import SUFFIXES, convert, exists, parse_yaml, read_text, to_plain
from mopsim.common.nearest import unknown
from mopsim.common.shipped import shipped_texts
from mopsim.common.values import require_fields
from mopsim.spec import renamed
from mopsim.spec.stack import Stack

_texts = partial(shipped_texts, "mopsim", "stacks")
_FEW = ("cpu", "compiled", "has")
SECTIONS = ("kernels", *_FEW, "sharding", "recompute", "host", "dtypes", "hides", "reading")
_PARTS = tuple(key for key in (*SECTIONS, "sources") if key not in _FEW)
"""Sections that hold every entry of theirs wherever a stack is written out."""
_OPEN = ("has", "compiled", "communication_share", "sources")
"""Mappings, in which a key that is not there says something too (`has`: the field may have any value)."""
_NAMES = ("name", "version", "extends", "source")
_ENTRIES = tuple(sorted({*Stack.__struct_fields__, "source"} - {"sources"}))
_OWN = ("runtime",)
"""Entries that a child does not have from its parent: whoever changes a program is not that program."""


def list_stacks() -> list[str]:
    """Names of the shipped stacks, sorted."""
    return sorted(_texts())


@named
def load_stack(ref: str | Path, field: str = "stack") -> Stack:
    """The stack that `field` names: a shipped one, or a YAML file; with what it extends.

    Raises MopError in one line: an unknown name with near ones and the known, a missing file, an entry that
    breaks a rule or has no source, a stack that extends itself.
    """
    name = str(ref)
    if name in _texts():
        return _named(name)
    path = Path(ref)
    if path.suffix not in SUFFIXES and not exists(path):
        raise unknown(field, name, list_stacks(), "stack")
    stack = _stack(read_text(path, field), str(path), field, ())
    _check_name(stack, str(path), field)
    return stack


def variants(stack: Stack, names: Iterable[str]) -> list[str]:
    """Those of `names` that are shipped stacks and extend what `stack` is, or extends."""
    shipped = [_named(one) for one in names if one in _texts()]
    return [one.name for one in shipped if one.name != stack.name and _root(one) == _root(stack)]


def graphed(stack: Stack) -> list[Stack]:
    """The shipped stacks that extend this one and replay kernels from CUDA graphs, where it does not."""
    if stack.host.graphs:
        return []
    return [one for one in map(_named, list_stacks()) if one.extends == stack.name and one.host.graphs]


def completed(data: Any, field: str) -> Any:
    """A plan's stack (plain objects) with the fields that it lacks, as the shipped stack of its name and
    version has them; mappings that it has stay as they are. One that lacks whole sections must be the shipped
    one: a file that was cut short would become a program that nobody wrote. Raises MopError naming the
    section from `field`."""
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        return data
    name, found = data["name"], data
    shipped = to_plain(_named(name)) if name in _texts() else {}
    if shipped and data.get("version", shipped["version"]) == shipped["version"]:
        found = _filled(data, shipped)
    gone = next((key for key in _PARTS if key not in data), None)
    if gone and not (shipped and convert(found, Stack, field) == _named(name)):
        rule = f"missing, the field is required where a stack is not the shipped {shown(name)}"
        raise MopError(f"{field}.{gone}: {rule}")
    return found


def inherited(data: Any) -> Any:
    """A plan's stack of a user's own (plain objects) with the entries that came later, as the shipped stack
    that it extends has them: what its file would say today."""
    parent = data.get("extends") if isinstance(data, dict) else None
    own = isinstance(parent, str) and parent in _texts() and data.get("name") not in _texts()
    return _filled(data, to_plain(_named(parent))) if own else data


def _filled(data: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """`data` with the fields of `base` that it lacks, in mappings that are not open too."""
    inner = (key for key in data if key not in _OPEN)
    both = (key for key in inner if isinstance(data[key], dict) and isinstance(base.get(key), dict))
    return {**base, **data, **{key: {**base[key], **data[key]} for key in both}}


def _root(stack: Stack) -> str:
    """The stack that extends no other."""
    return _root(_named(stack.extends)) if stack.extends in _texts() else stack.extends or stack.name


def _check_name(stack: Stack, origin: str, field: str) -> None:
    """Raise MopError where a file has name and version of a shipped stack and other entries: plans and
    results would name that one."""
    if stack.name not in _texts() or stack.version != _named(stack.name).version:
        return
    ours, theirs = (_plain_entries(one) for one in (stack, _named(stack.name)))
    other = sorted(path for path in {**ours, **theirs} if ours.get(path) != theirs.get(path))
    if other:
        raise MopError(
            f"{origin}: {field}.name: {stack.name!r} is a shipped stack, whose {other[0]} is "
            f"{shown(theirs.get(other[0]))} in this version: give the file a name or a version of its own"
        )


def _plain_entries(stack: Stack) -> dict[str, Any]:
    """Dotted field -> plain value."""
    plain = to_plain(replace(stack, name="stack", version="", extends="", sources={}))
    found: dict[str, Any] = {}
    for name, value in plain.items():
        parts = value if name in SECTIONS and isinstance(value, dict) else {"": value}
        found |= {f"{name}.{part}".rstrip("."): one for part, one in parts.items()}
    return found


@cache
def _named(name: str) -> Stack:
    return _stack(_texts()[name], f"stack {name}", "stack", (name,))


def _stack(text: str, origin: str, field: str, seen: tuple[str, ...]) -> Stack:
    data = _resolved(text, origin, field, seen)
    if isinstance(data.get("cpu"), dict):
        data["cpu"] = {**data.get("kernels", {}), **data["cpu"]}
    stack = convert(data, Stack, field, origin)
    if not stack.version.strip():
        raise MopError(f"{origin}: {field}.version: '' must say of which version the entries are")
    return stack


def _resolved(text: str, origin: str, field: str, seen: tuple[str, ...]) -> dict[str, Any]:
    """Plain fields of a Stack: the file's over those of what it extends. seen: names on the way here."""
    data = require_fields(parse_yaml(text, origin), f"{origin}: {field}")
    renamed.refuse_old(data, f"{origin}: {field}")
    own = _flat(data, origin, field)
    parent = data.get("extends") or ""
    if not parent:
        return own
    if not isinstance(parent, str) or parent not in _texts():
        raise unknown(f"{origin}: {field}.extends", str(parent), list_stacks(), "stack", file=False)
    if parent in seen:
        round_trip = " -> ".join((*seen, parent))
        raise MopError(f"{origin}: {field}.extends: {parent!r} leads back to itself: {round_trip}")
    base = _resolved(_texts()[parent], f"stack {parent}", "stack", (*seen, parent))
    return _over(base, own)


def _over(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The entries of a child over its parent's; a source goes with the entry that it is of."""
    found = {key: value for key, value in base.items() if key not in _OWN}
    sources = {key: text for key, text in base["sources"].items() if key not in _OWN}
    if own.get("kernels", {}).get("expert_room") == 0:  # what is stashed is of rows that there is room for
        found["kernels"] = {**found.get("kernels", {}), "expert_stash": 0.0}
        sources.pop("kernels.expert_stash", None)
    for key, value in own.items():
        if key in SECTIONS and isinstance(value, dict):
            found[key] = {**found.get(key, {}), **value}
        else:
            found[key] = value
    return {**found, "sources": {**sources, **own["sources"]}}


def _flat(data: dict[str, Any], origin: str, field: str) -> dict[str, Any]:
    """The fields of a file without their sources, which are put in `sources` by dotted field."""
    for key in SECTIONS:
        if not isinstance(data.get(key, {}), dict):
            raise MopError(f"{origin}: {field}.{key}: {shown(data[key])} must be a mapping of fields")
        source = data.get(key, {}).get("source", "")  # which its entries may all have of their own
        if not isinstance(source, str):
            raise MopError(f"{origin}: {field}.{key}.source: {shown(source)} must be text")
    plain = {"name", "version", "extends"} | (set(data) - set(_ENTRIES))  # an unknown one is refused as such
    found: dict[str, Any] = {key: value for key, value in data.items() if key in plain}
    sources: dict[str, str] = {}
    for path, value, source in _entries(data):
        _check_keys(value, f"{origin}: {field}.{'.'.join(path)}")
        if not isinstance(source, str) or not source.strip():
            raise MopError(
                f"{origin}: {field}.{'.'.join(path)}: {shown(value)} has no source: write "
                "{value: ..., source: ...}, or `source` in the section"
            )
        sources[".".join(path)] = source
        if len(path) == 1:
            found[path[0]] = value
        else:
            found.setdefault(path[0], {})[path[1]] = value
    return {**found, "sources": sources}


def _entries(data: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """(path, value, source) of every entry of a file."""
    for key, value in data.items():
        if key in _NAMES or key not in _ENTRIES:
            continue
        if key in SECTIONS:
            for name, entry in value.items():
                if name != "source":
                    yield ((key, str(name)), *_split(entry, value.get("source")))
        else:
            yield ((str(key),), *_split(value, data.get("source")))


def _split(entry: Any, source: Any) -> tuple[Any, Any]:
    """(value, source) of an entry, which may have a source of its own."""
    if isinstance(entry, dict) and "value" in entry and set(entry) <= {"value", "source"}:
        return entry["value"], entry.get("source", source)
    return entry, source


def _check_keys(entry: Any, path: str) -> None:
    """Raise MopError where what is left of an entry has keys of {value: ..., source: ...}."""
    if not isinstance(entry, dict) or not {"value", "source"} & set(entry):
        return
    if "value" not in entry:
        raise MopError(f"{path}: {shown(entry)} has a source and no value: write {{value: ..., source: ...}}")
    for key in (one for one in entry if one not in ("value", "source")):
        rule = "is no part of an entry, which has value and source alone"
        raise MopError(f"{path}.{shown(key).strip(chr(39))}: {shown(entry[key])} {rule}")
