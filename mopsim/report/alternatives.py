"""What of a plan may be otherwise and is as fast, in the notation in which plans are printed."""

from collections.abc import Mapping, Sequence
from typing import Any

from mopsim.common.changes import changed
from mopsim.common.errors import MopError
from mopsim.common.io import convert
from mopsim.spec.line import describe
from mopsim.spec.strategy import Strategy

Fields = Mapping[str, Any]
IMPLIED = {
    "attention.cp_comm_type": "CP=1", "activations.recompute": "recompute=",
    "activations.modules": "recompute=", "experts.token_dispatcher": "EP=1",
}  # fmt: skip
"""Fields that one rank does not read, or that a word says already, by the beginning of that word."""
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


def freedom(plan: Fields, alone: Mapping[str, Sequence[Any]], together: Sequence[Fields]) -> str:
    """'mbs=2 or mbs=4; or dense.prefetch 1 or 2; or mbs=2 with no offload': each is an alternative to the
    row's plan (`search.result.Freedom`), of those of several fields the shortest. plan: its strategy's
    fields."""
    said = [_choice(plan, name, values) for name, values in alone.items()]
    each = sorted(dict.fromkeys(tuple(otherwise(plan, fields)) for fields in together), key=len)
    short = [words for words in each if len(words) <= MOST_WORDS][:MOST_TOGETHER] or each[:1]
    said += [" with ".join(filter(None, (words[0], " and ".join(words[1:])))) for words in short]
    left = len(each) - len(short)
    if left:
        said.append(f"one of {left} more combinations" if left > 1 else "one more combination")
    return "; or ".join(said)


def _choice(plan: Fields, name: str, values: Sequence[Any]) -> str:
    """Other values of a field, the plan's being the first; where its line does not say the field, all."""
    words = [otherwise(plan, {name: value}) for value in values[1:]]
    if any(f"{name} {_value(value)}" in each for value, each in zip(values[1:], words, strict=True)):
        return f"{name} {' or '.join(map(_value, _ordered(values)))}"
    return " or ".join(" ".join(each) for each in words)


def otherwise(plan: Fields, changes: Fields) -> list[str]:
    """Words of the line of a plan with these changes that the plan's own has not; then the changes that a
    line does not say, by the fields' names."""
    before, after = _words(plan, {}), _words(plan, changes)
    if before is None or after is None:
        return [f"{name} {_value(value)}" for name, value in changes.items()]
    said = [word for place, word in after.items() if before.get(place) != word]
    gone = {place: _left_out(word) for place, word in before.items() if place not in after}
    said += [word for place, word in gone.items() if OF.get(place) not in gone.values()]
    for name, value in changes.items():
        if name in IMPLIED and any(word.startswith(IMPLIED[name]) for word in said):
            continue
        rest = {other: one for other, one in changes.items() if other != name}
        if _words(plan, rest) == after:
            said.append(f"{name} {_value(value)}")
    return said


def _words(plan: Fields, changes: Fields) -> dict[str, str] | None:
    """The words of a plan's line by what they are of; None where there is no such plan."""
    try:
        words = describe(changed(convert(plan, Strategy, "strategy"), changes, "strategy")).split()
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


def _ordered(values: Sequence[Any]) -> Sequence[Any]:
    """Numbers ascending, anything else as it came."""
    return sorted(values) if all(isinstance(one, int | float) for one in values) else values


def _value(value: Any) -> str:
    return "+".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value).lower()
