"""YAML (and so JSON) as text, strictly: what surprises in YAML 1.1 is not read, what is refused is named."""

import re
from dataclasses import dataclass
from typing import Any

import yaml

from mopsim.common.errors import MopError
from mopsim.common.values import DEEPEST, MOST_DIGITS, Endless, first_unreadable, trimmed

_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_NUMBERS = "-+.0123456789"
_NOT_READ = ("timestamp", "binary", "set", "omap", "pairs")
_FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$"
    r"|^[-+]?[0-9]+[eE][-+]?[0-9]+$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)
_INT = re.compile(r"^[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML that reads 3e-4 as a number (YAML 1.1 wants 3.0e-4), 1:30 and 2026-01-02 as text, and refuses
    a key that is given twice."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._merged: set[int] = set()

    def flatten_mapping(self, node: Any) -> None:
        """Replace merge keys (`<<: *other`) by what they merge, before which a mapping's own keys go."""
        if id(node) in self._merged:
            return
        self._merged.add(id(node))
        self._check_once(node)
        super().flatten_mapping(node)
        last = {_same(key_node): (key_node, value) for key_node, value in node.value}
        node.value = list(last.values())  # else merges of merges would grow without end

    def _check_once(self, node: Any) -> None:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = "<<" if key_node.tag == _MERGE else self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float | bool) and key in seen:
                problem = f"the key {key!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key if isinstance(key, str | int | float | bool) else id(key_node))

    def construct_integer(self, node: Any) -> Any:
        text = self.construct_scalar(node)
        return self.construct_yaml_int(node) if len(text) <= MOST_DIGITS else Endless(text)


def _same(key_node: Any) -> Any:
    """Equal for keys that are the same scalar."""
    return (key_node.tag, key_node.value) if isinstance(key_node, yaml.ScalarNode) else id(key_node)


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Quotes the strings that _Loader, or a plain reader of YAML, would read as numbers or dates."""


for _kind in (_Loader, _Dumper):
    if _kind is _Loader:
        _kind.yaml_implicit_resolvers = {
            first: [
                (tag, rule)
                for tag, rule in rules
                if tag.removeprefix(_TAG) not in ("int", "float", *_NOT_READ)
            ]
            for first, rules in _kind.yaml_implicit_resolvers.items()
        }
        _kind.yaml_constructors = {
            tag: make
            for tag, make in _kind.yaml_constructors.items()
            if tag is None or tag.removeprefix(_TAG) not in _NOT_READ
        }
        _kind.add_constructor(f"{_TAG}int", _Loader.construct_integer)
        _kind.add_implicit_resolver(f"{_TAG}int", _INT, list(_NUMBERS))
    _kind.add_implicit_resolver(f"{_TAG}float", _FLOAT, list(_NUMBERS))


def parse_yaml(text: str, origin: str) -> Any:
    """The plain objects of a YAML (or JSON) text. Raises MopError naming `origin`, and the line or field."""
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        where = f" line {mark.line + 1}:" if mark else ""
        made = mark if isinstance(error, yaml.constructor.ConstructorError) else None
        field = field_at(text, (made.line, made.column) if made else None)
        raise MopError(f"{origin}:{where} {field}is not valid YAML: {problem}") from None
    except (ValueError, RecursionError) as error:
        raise MopError(f"{origin}: is not valid YAML: {error}") from None
    problem_at = first_unreadable(data)
    if problem_at is not None:
        raise MopError(": ".join(part for part in (origin, *problem_at) if part))
    return data


def dump_yaml(data: Any) -> str:
    """The YAML text of plain objects, keys in their order."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


@dataclass
class _Open:
    """A mapping or list that is being read. step: the key or index that was read last."""

    is_mapping: bool
    step: Any = None
    wants_key: bool = True


def field_at(text: str, place: tuple[int, int] | None) -> str:
    """'field: ' of what stands at `place` (line, column; from 0), else of where the text breaks off."""
    if place is None:
        text = text[: _too_deep(text)]
    opened: list[_Open] = []
    try:
        for event in yaml.parse(text, Loader=_Loader):
            if isinstance(event, yaml.CollectionEndEvent):
                opened.pop()
            elif isinstance(event, yaml.NodeEvent):
                if opened:
                    _advance(opened[-1], event)
                mark = event.start_mark
                if place is not None and mark is not None and (mark.line, mark.column) >= place:
                    break
                if isinstance(event, yaml.CollectionStartEvent):
                    opened.append(_Open(isinstance(event, yaml.MappingStartEvent)))
    except yaml.YAMLError:
        pass
    steps = [one.step for one in opened if one.step is not None]
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    found = trimmed(path.removeprefix("."))
    return f"{found[:200]}: " if found else ""


def _advance(place: _Open, event: yaml.NodeEvent) -> None:
    """A node was read in `place`: an item, a key, or the value of one."""
    if not place.is_mapping:
        place.step = 0 if place.step is None else place.step + 1
    else:
        if place.wants_key:
            key = getattr(event, "value", None)
            place.step = "''" if key == "" else key
        place.wants_key = not place.wants_key


def _too_deep(text: str) -> int:
    """Where more brackets are open than any file of ours has: the scanner reads on before it says a word."""
    depth = 0
    for bracket in re.finditer(r"[\[\]{}]", text):
        depth += 1 if bracket.group() in "[{" else -1
        if depth > 2 * DEEPEST:
            return bracket.start()
    return len(text)
