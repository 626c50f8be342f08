"""What a row of a runs table leaves unsaid: its notes in a standard form, and what recipes set. All is data.

data/stacks.yaml names the stack of a source, data/programs.yaml that of the program that a row's words name,
data/words.yaml cells that words fill, data/dates.yaml the first month of a card and a network,
data/notes.yaml what notes mean, data/recipes.yaml what programs set for one network, machine or release,
data/families.yaml what follows from how state is sharded.
"""

import re
from dataclasses import replace
from functools import cache

from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.common.rules import UNKNOWN, Condition, RowFacts, Rule, applied
from mopsim.common.shipped import listed_in, named_in, shipped
from mopsim.spec.strategy import Exchange, Tier
from mopsim.validate.case import machine
from mopsim.validate.columns import ROOTS
from mopsim.validate.tables import Row, UnsupportedError

rules = listed_in("mopsim.validate", Rule, "data/notes.yaml", "data/recipes.yaml")
"""All rules, in the order in which they are tried."""


@cache
def stack_names() -> dict[str, str]:
    """Source -> stack."""
    return dict(shipped("mopsim.validate", "data/stacks.yaml"))


class NamedStack(Condition, frozen=True, kw_only=True):
    """The stack of rows of which the condition is true: see data/programs.yaml. general: it stands for
    programs that nobody described."""

    stack: str
    general: bool = False


class FirstMonth(Condition, frozen=True, kw_only=True):
    """The month before which no row is of which the condition is true: see data/dates.yaml."""

    month: str
    source: str


programs = listed_in("mopsim.validate", NamedStack, "data/programs.yaml")
"""The programs, in the order in which they are tried."""
words = named_in("mopsim.validate", Condition, "data/words.yaml")
"""Cells that are `yes` where the condition is true of a row."""
first_months = listed_in("mopsim.validate", FirstMonth, "data/dates.yaml")
"""From when cards and networks were there."""


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


families = named_in("mopsim.validate", FamilyHabits, "data/families.yaml")
"""The families by name."""


@cache
def general_stacks() -> frozenset[str]:
    """The stacks that stand for programs that nobody described."""
    of_words = {one.stack for one in programs() if one.general}
    return frozenset({one.stack for one in families().values()} | of_words)


def facts(row: Row) -> RowFacts:
    """All that is known of a row. `stack` is looked up from `source` where it is missing; `stages` is pp x
    vp; `architecture` is its card's (HardwareProfile.device); `graphs` are the components that CUDA graphs
    replay, joined by +, or `step`."""
    names = " ".join(row.get(column, "") for column in ("source", "source_ref", "notes"))
    more = {"stack": row.get("stack", ""), "stages": _stages(row), "names": names}
    more["architecture"] = _architecture(row)
    more["date"], more["dated"] = _month(row, names.lower())
    more |= {cell: "yes" for cell, condition in words().items() if condition.fits(row)}
    if more["stack"] in UNKNOWN:
        by_words = _named({**row, **more})
        more["stack"] = stack_names().get(row["source"]) or by_words
        more["by_words"] = "yes" if by_words and row["source"] not in stack_names() else ""
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


_NAMES = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_MONTH = re.compile(
    r"(?:(?<![0-9a-z])|(?<=dev))(20(?:1[7-9]|2\d))(?:[-/.](0?[1-9]|1[0-2])(?!\d|[-/.]\d{3})|(0[1-9]|1[0-2])"
    r"(?:0[1-9]|[12]\d|3[01])?)(?![0-9a-z])(?! ?(?:tokens|samples|sequences|steps))"
)
_WORDS = re.compile(rf"\b({'|'.join(_NAMES)})[a-z]*\.?,? (?:\d\d?,? )?(20(?:1[7-9]|2\d))\b")
_BACKWARDS = re.compile(r"(?<![\d./])(?:[0-3]?\d[./])?(0?[1-9]|1[0-2])[./](20(?:1[7-9]|2\d))(?!\d)")
_RELEASE = re.compile(r"\b(?:nemo|ngc|pytorch|container|image|jax|release)[ :-]?(2[3-9])\.(0[1-9]|1[0-2])\b")
"""Months as dates have them (2026-08, 2026/8, 202608, 20260815; August 2026; 15.08.2026), as torch's nightly
builds do (dev20260815), and as NVIDIA's containers and NeMo are numbered."""
_OTHERS = re.compile(
    r"\b(?:no|not|never|vs\.?|versus|unlike|without|instead of|rather than|compared (?:to|with)) [^\s,;]+"
)
"""A program that is named to say that it is another."""


def _month(row: Row, names: str) -> tuple[str, str]:
    """The latest month that the row's words name and `yes`; else the first in which its card and its network
    were there and ''."""
    said = {(year, one or other) for year, one, other in _MONTH.findall(names)}
    said |= {(year, str(_NAMES.index(month) + 1)) for month, year in _WORDS.findall(names)}
    said |= {(year, month) for month, year in _BACKWARDS.findall(names)}
    said |= {(f"20{year}", month) for year, month in _RELEASE.findall(names)}
    months = {f"{year}-{int(month):02d}" for year, month in said}
    bounds = (one.month for one in first_months() if one.fits(row))
    return (max(months), "yes") if months else (max(bounds, default=""), "")


def _named(row: Row) -> str:
    """The stack of the program that the row's words name, but for those that they say it is not."""
    said = {**row, "names": _OTHERS.sub("", row["names"].lower())}
    return next((one.stack for one in programs() if one.fits(said)), "")


def _architecture(row: Row) -> str:
    """The architecture of the row's card; '' of a card that has none, or that nobody knows."""
    try:
        return machine(row.get("gpu", "")).device.architecture
    except MopError:
        return ""


def _stages(row: Row) -> str:
    """Parts of the pipeline: its degree times its virtual stages; '' where one is no number."""
    degrees = (row.get("pp", ""), row.get("vp", "") or "1")
    plain = all(one.isdecimal() and len(one) < 10 for one in degrees)
    return str(int(degrees[0]) * int(degrees[1])) if plain else ""
