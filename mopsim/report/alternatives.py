"""What of a plan may be otherwise and is as fast, in the notation in which plans are printed."""

from collections.abc import Mapping, Sequence
from typing import Any

from mopsim.common.changes import changed
from mopsim.common.errors import MopError
from mopsim.common.io import convert
from mopsim.spec.line import describe
from mopsim.spec.strategy import Strategy

Fields = Mapping[str, Any]
OF = {
    "CP-by": "CP=1", "sequence-parallel": "TP=1", "dispatch": "EP=1", "experts-apart": "EP=1",
    "schedule": "PP=1", "layers": "PP=1",
}  # fmt: skip
"""Words that a line has beside a degree only, and what takes them away with it."""
USUAL = {
    "dispatch": "dispatch=alltoall", "layers": "even layers", "schedule": "the usual schedule",
    "expert-FSDP": "the usual expert-FSDP",
}  # fmt: skip
"""What a line without a word says: the usual, not that the plan has none of it."""
MOST_TOGETHER, MOST_WORDS = 3, 4
"""Combinations that a row names, and words of each of these but the first; the others are counted, the JSON
has all."""


def freedom(
    plan: Fields, alone: Mapping[str, Sequence[Any]], together: Sequence[Fields], routed: bool = True
) -> str:
    """'mbs=2 or mbs=4; or mbs=2 with no offload': each is an alternative to the row's plan
    (`search.result.Freedom`), of those of several fields the shortest. What no plan's line says is left out.
    plan: its strategy's fields. routed: whether the network has experts."""

    def words(changes: Fields) -> tuple[str, ...]:
        return tuple(otherwise(plan, changes, routed))

    choices = [[words({name: value}) for value in values[1:]] for name, values in alone.items()]
    known = {one for choice in choices for one in choice} | {()}
    each = sorted((one for one in dict.fromkeys(map(words, together)) if one not in known), key=len)
    short = [words for words in each if len(words) <= MOST_WORDS][:MOST_TOGETHER] or each[:1]
    left = len(each) - len(short)
    more = f"one of {left} more combinations" if left > 1 else "one more combination" if left else ""
    return "; or ".join(filter(None, (*map(_choice, choices), *map(_with, short), more)))


def _choice(values: Sequence[Sequence[str]]) -> str:
    return " or ".join(dict.fromkeys(" ".join(words) for words in values if words))


def _with(words: Sequence[str]) -> str:
    """'mbs=2 with DP=8 and EP=8'."""
    return " with ".join(filter(None, (words[0], " and ".join(words[1:]))))


def otherwise(plan: Fields, changes: Fields, routed: bool = True) -> list[str]:
    """Words of the line of a plan with these changes that the plan's own has not, and what says that one is
    gone; of a degree where no other one changes, as the ranks are the same. None of no plan."""
    before, after = _words(plan, {}, routed), _words(plan, changes, routed)
    if before is None or after is None:
        return []
    said = {place: word for place, word in after.items() if before.get(place) != word}
    gone = {place: _left_out(word) for place, word in before.items() if place not in after}
    told = any(map(_degree, said))
    return [*said.values(), *(
        word for place, word in gone.items()
        if OF.get(place) not in gone.values() and not (told and _degree(place))
    )]  # fmt: skip


def _degree(place: str) -> bool:
    """'DP', 'FSDP', 'ZeRO-1'."""
    return place.partition("-")[0] in ("ZeRO", place.upper())


def _words(plan: Fields, changes: Fields, routed: bool) -> dict[str, str] | None:
    """The words of a plan's line by what they are of; None where there is no such plan."""
    try:
        words = describe(changed(convert(plan, Strategy, "strategy"), changes, "strategy"), routed).split()
    except MopError:
        return None
    return {_place(word.partition("=")[0]): word for word in words}


def _place(key: str) -> str:
    return "loss" if key.startswith("vocab-") else key


def _left_out(word: str) -> str:
    """What is said of a plan whose line lacks a word: 'EP=1', 'reshard=yes', 'dispatch=alltoall', 'no
    offload'."""
    key, _, value = word.partition("=")
    if key in USUAL:
        return USUAL[key]
    if value == "no":
        return f"{key}=yes"
    return f"{key}=1" if key.isupper() else f"no {key}"
