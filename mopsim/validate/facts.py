"""What a row of a runs table leaves unsaid: its notes in a standard form, and what recipes set. All is data.

data/stacks.yaml names the stack of a source, data/notes.yaml what notes mean, data/recipes.yaml what programs
set for one network, machine or release, data/families.yaml what follows from how state is sharded.
"""

from dataclasses import replace
from functools import cache

from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.common.rules import UNKNOWN, RowFacts, Rule, applied, load_rules
from mopsim.common.shipped import shipped
from mopsim.spec.strategy import Exchange, Tier
from mopsim.validate.columns import ROOTS
from mopsim.validate.tables import Row, UnsupportedError


@cache
def rules() -> tuple[Rule, ...]:
    """All rules, in the order in which they are tried."""
    return load_rules("mopsim.validate", "data/notes.yaml", "data/recipes.yaml")


@cache
def stack_names() -> dict[str, str]:
    """Source -> stack."""
    return dict(shipped("mopsim.validate", "data/stacks.yaml"))


def loss_parts(kind: object) -> int | None:
    """Chunks that a stack's chunked loss makes of a rank's tokens, where it counts chunks (losses.yaml)."""
    known = shipped("mopsim.validate", "data/losses.yaml").get(kind)
    return int(known["chunks"]) if known else None


class FamilyHabits(io.Spec, frozen=True, kw_only=True):
    """What a kind of sharding says where a row does not: see data/families.yaml."""

    stack: str
    context_exchange: Exchange
    gathers: bool = False
    grad_tier: Tier = "device"
    vocabulary_rows: int = 0


@cache
def families() -> dict[str, FamilyHabits]:
    """The families by name."""
    plain = shipped("mopsim.validate", "data/families.yaml")
    return {name: io.convert(one, FamilyHabits, name) for name, one in plain.items()}


@cache
def general_stacks() -> frozenset[str]:
    """The stacks that stand for programs that nobody described."""
    return frozenset(one.stack for one in families().values())


def facts(row: Row) -> RowFacts:
    """All that is known of a row. `stack` is looked up from `source` where it is missing; `stages` is pp x
    vp; `graphs` are the components that CUDA graphs replay, joined by +, or `step`."""
    stack = row.get("stack", "")
    named = stack_names().get(row["source"], "") if stack in UNKNOWN else stack
    names = " ".join(row.get(column, "") for column in ("source", "source_ref", "notes"))
    more = {"stack": named, "stages": _stages(row), "names": names}
    known = applied(rules(), row, ROOTS, more)
    settings, graphs = dict(known.settings), known.row.get("graphs", "")
    if graphs not in (*UNKNOWN, "none"):
        settings["stack.host.graphs"] = graphs.split("+")
    for name, cell in row.items():
        if name.startswith(ROOTS) and cell not in UNKNOWN:
            try:
                settings[name] = io.parse_yaml(cell, name)
            except MopError as error:
                raise UnsupportedError(name, str(error)) from None
    return replace(known, settings=settings)


def _stages(row: Row) -> str:
    """Parts of the pipeline: its degree times its virtual stages; '' where one is no number."""
    degrees = (row.get("pp", ""), row.get("vp", "") or "1")
    plain = all(one.isdecimal() and len(one) < 10 for one in degrees)
    return str(int(degrees[0]) * int(degrees[1])) if plain else ""
