"""An unknown name: which known ones are nearest in meaning, and the refusal that says so."""

import difflib
import re
from collections.abc import Iterable
from functools import lru_cache

from mopsim.common.errors import MopError, shown

LISTED = {"preset": "models", "profile": "hardware", "stack": "stacks"}
"""Kinds of names -> what `mopsim list` calls them."""
_SAME, _PREFIX = 1.0, 0.6
_SAME_NAME = 0.85
"""Likeness from which two names are one that is misspelt: `fit` and `fits` are."""


def nearest(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The known names nearest to `name`, nearest first; none where none is near.

    A name is made of words (`b200-sxm-192g`): a word in common says more than letters in common, so that B200
    is near b200-sxm-192g and not near gb200-186g. Letters decide among equals, and where no word is shared.
    """
    return list(_nearest(name, tuple(known))[:most])


@lru_cache(maxsize=256)
def _nearest(name: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """All that are near: a table of many rows asks for the same name in each."""
    asked = _words(name)[:20]
    scores = {one: (_shared(asked, _words(one)), _alike(name, one)) for one in known}
    same = max((words for words, _ in scores.values()), default=0.0)
    if same >= 0.2:
        ranked = {one: words + letters / 2 for one, (words, letters) in scores.items() if words >= 0.6 * same}
    else:
        ranked = {one: letters for one, (_, letters) in scores.items() if letters >= 0.6}
    return tuple(sorted(ranked, key=lambda one: (-ranked[one], one)))


def misspelt(name: str, known: Iterable[str], least: float = _SAME_NAME) -> str:
    """The known name that can only be meant: all but a few letters are the same, or one is how the other
    begins, for two words at least. '' where there is none: much less is near than for `nearest`. least:
    likeness from which two names are one."""
    for one in known:
        short, long = sorted((_words(name[:200]), _words(one)), key=len)
        begins = len(short) > 1 and long[: len(short)] == short
        if begins or _alike(name, one) >= least:
            return one
    return ""


def unknown(field: str, name: str, known: Iterable[str], kind: str, file: bool = True) -> MopError:
    """The refusal of a `name` that is no `kind` (file: nor a file): near names, then where the list of all is
    (LISTED), or all."""
    names = list(known)
    near = nearest(name.replace("\\", "/").rstrip("/").rpartition("/")[2], names)
    hints = [f"near: {', '.join(near)}"] if near else []
    if file and kind in LISTED:
        hints.append(f"mopsim list {LISTED[kind]} has all {len(names)}")
    elif file:
        hints.append(f"known: {', '.join(names)}")
    what = f"neither a {kind} nor a file" if file else f"not one of {', '.join(names)}"
    return MopError("; ".join([f"{field}: {shown(name)} is {what}", *hints]))


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", name.lower())


def _shared(asked: list[str], known: list[str]) -> float:
    """Part of the asked letters whose words `known` has, or has longer or shorter."""
    total = sum(map(len, asked))
    if not total or not known:
        return 0.0
    return sum(max(_same(word, other) for other in known) * len(word) for word in asked) / total


def _same(word: str, other: str) -> float:
    if word == other:
        return _SAME
    short, long = sorted((word, other), key=len)
    return _PREFIX if len(short) >= 2 and long.startswith(short) else 0.0


def _alike(name: str, other: str) -> float:
    """Likeness of the letters alone, from 0 to 1: 'Qwen3-30B-A3B' and 'qwen3_30b_a3b' are the same."""
    return difflib.SequenceMatcher(None, "".join(_words(name[:200])), "".join(_words(other))).ratio()
