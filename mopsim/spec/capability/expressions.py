"""Expressions of the table's data, compiled to functions of a job."""

import ast
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from mopsim.common.let import Let
from mopsim.common.shipped import kept
from mopsim.spec.capability.job import Job
from mopsim.spec.categories import MODULES
from mopsim.spec.layout import ceil_div, interval
from mopsim.spec.strategy import CAST, even_parts

_PARTS = ("model", "strategy", "training", "hardware", "fsdp", "chunks")


CONDITIONS: dict[str, str] = kept(__package__, "conditions.yaml")
SIDES: dict[str, dict[str, Any]] = kept(__package__, "fields.yaml")["sides"]


@cache
def holds(name: str) -> Callable[[Job], bool]:
    """The condition of conditions.yaml with this name."""
    return compiled(CONDITIONS[name])


@cache
def fields_read(name: str) -> frozenset[str]:
    """Paths of the strategy's fields that the condition of this name reads, itself or through others."""
    tree = list(ast.walk(ast.parse(CONDITIONS[name].strip(), mode="eval")))
    inner = {id(node.value) for node in tree if isinstance(node, ast.Attribute)}
    whole = [ast.unparse(node) for node in tree if isinstance(node, ast.Attribute) and id(node) not in inner]
    own = {path.removeprefix("strategy.") for path in whole if path.startswith("strategy.")}
    others = {node.id for node in tree if isinstance(node, ast.Name) and node.id in CONDITIONS}
    return frozenset(own.union(*map(fields_read, others)))


def holds_rows(rows: int, ranks: int) -> bool:
    """Whether the last of `ranks` has any of `rows`."""
    start, stop = interval(rows, ranks, ranks - 1)
    return start < stop


def experts_of(side: str, name: str) -> str | None:
    """A side's preset of the experts of a network, by the beginning of its name, if it has one."""
    presets = SIDES[side]["experts"]
    return next((preset for start, preset in presets.items() if name.startswith(start)), None)


def flavor_of(side: str, name: str) -> Sequence[str]:
    """A side's name and flavor of a network, both empty where it has none."""
    found: Sequence[str] = SIDES[side]["flavors"].get(name, ("", ""))
    return found


def code_has(side: str, name: str, what: str) -> bool:
    """Whether a side's code of a network has something; yes of a network without a flavor."""
    code = SIDES[side]["code"].get(flavor_of(side, name)[0])
    return code is None or what in code


_CALLED = {
    "holds_rows": holds_rows,
    "experts_of": experts_of,
    "flavor_of": flavor_of,
    "code_has": code_has,
    "ceil_div": ceil_div,
    "even_parts": even_parts,
    "MODULES": MODULES,
    "CAST": CAST,
}


class _Names(ast.NodeTransformer):
    """Names of parts become the job's, of conditions calls with the job."""

    def __init__(self) -> None:
        self.conditions = set[str]()

    def visit_Name(self, node: ast.Name) -> ast.expr:
        name = node.id
        if name in CONDITIONS:
            self.conditions.add(name)
            return ast.parse(f"{name}(job)", mode="eval").body
        if name in _PARTS or name == "stack":
            return ast.parse(f"job.{'software' if name == 'stack' else name}", mode="eval").body
        return node


def compiled(text: str, let: Mapping[str, str] | None = None, message: bool = False) -> Callable[..., Any]:
    """A function (job, value=None, does="") of an expression; of a message with expressions in braces."""
    return _compiled(f'f"""{text}"""' if message else text, tuple((let or {}).items()))


@cache
def _compiled(text: str, let: tuple[tuple[str, str], ...]) -> Callable[..., Any]:
    names = _Names()
    body = names.visit(Let(dict(let)).visit(ast.parse(text.strip(), mode="eval").body))
    whole = ast.parse("lambda job, value=None, does='': 0", mode="eval")
    assert isinstance(whole.body, ast.Lambda)
    whole.body.body = body
    known = _CALLED | {name: holds(name) for name in names.conditions}
    found: Callable[..., Any] = eval(compile(ast.fix_missing_locations(whole), text, "eval"), known)
    return found
