"""The columns of the tables that `mopsim validate` reads: data/columns.yaml."""

from collections.abc import Mapping
from typing import Literal

from msgspec.structs import replace

from mopsim.common.io import Spec, convert
from mopsim.common.shipped import shipped
from mopsim.spec.categories import MODULES


class Column(Spec, frozen=True, kw_only=True):
    """One column: see the head of data/columns.yaml."""

    meaning: str
    needed: bool = False
    values: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    read: bool = True
    kind: Literal["", "count", "number", "documents"] = ""
    least: int = 1
    field: str = ""
    of: Literal["all", "experts", "mla"] = "all"
    must: Literal["", "all", "experts", "dense"] = ""


def _read(plain: dict[str, object], name: str) -> Column:
    column = convert(plain, Column, name)
    words = (MODULES if word == "modules" else (word,) for word in column.words)
    return replace(column, words=tuple(word for some in words for word in some))


_TABLES = shipped("mopsim.validate", "data/columns.yaml")
RUNS, MODELS, COMPONENTS = (
    {name: _read(one, name) for name, one in _TABLES[table].items()}
    for table in ("runs", "models", "components")
)
ROOTS = ("strategy.", "model.", "stack.")
"""Heads of dotted fields of a case: also columns that a table may have, each overriding every rule."""
NEEDED = ("seq_len", "micro_batch", "num_gpus", "tp", "pp", "cp", "sharding", "recompute")
"""Fields without which a run is not determined; vp with a pipeline, ep, etp and routing with experts also."""
NAMES = frozenset((*RUNS, *MODELS, *COMPONENTS))
"""Columns of any of the tables."""


def needed(columns: Mapping[str, Column]) -> tuple[str, ...]:
    """The columns without which a table is refused."""
    return tuple(name for name, column in columns.items() if column.needed)
