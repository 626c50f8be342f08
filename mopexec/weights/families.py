"""The tensors of Hugging Face checkpoints by architecture (architectures.yaml)."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import msgspec

from mopsim.common.io import Spec, convert
from mopsim.common.shipped import kept

BALANCE_BIAS = "layers.*.moe.router.balance_bias"
_WORDS = re.compile("<(.*?)>")


class TensorPlace(Spec, frozen=True, kw_only=True):
    """Where a parameter (of a stack: one expert's matrix) lies. transposed: the file has [outputs, inputs].
    first, step: it is every step-th element of the last dimension, from the first on. part, parts: it is one
    of so many equal parts of the last dimension. row: the file has it as a matrix of one row.
    """

    tensor: str
    row: bool = False
    transposed: bool = False
    first: int = 0
    step: int = 1
    part: int = 0
    parts: int = 1


class Family(Spec, frozen=True, kw_only=True):
    """One architecture. copies: tensors that may be in a file beside the one that they equal; written where
    `writes_copies`. balance_bias: whether it has a place for the routers' balance bias. base: of the names in
    these files, which files of the network without its head do not have. buffers: a pattern of names, without
    it, of tensors that are no weights.
    """

    architecture: str
    table: dict[str, TensorPlace]
    copies: dict[str, str]
    writes_copies: bool
    base: str = ""
    buffers: str = ""

    @property
    def balance_bias(self) -> bool:
        return BALANCE_BIAS in self.table


def _places(group: Mapping[str, Any]) -> Iterator[tuple[str, TensorPlace]]:
    """The parameters of a group, each with its place."""
    for ours, place in group.items():
        whole = convert({"tensor": place} if isinstance(place, str) else place, TensorPlace, ours)
        words = [given.split() for given in _WORDS.findall(ours)]
        theirs = [given.split() for given in _WORDS.findall(whole.tensor)]
        pairs = [list(zip(own, its or own, strict=True)) for own, its in zip(words, theirs, strict=True)]
        for chosen in product(*pairs):
            tensor = _filled(whole.tensor, [its for _, its in chosen])
            yield _filled(ours, [own for own, _ in chosen]), msgspec.structs.replace(whole, tensor=tensor)


def _filled(text: str, words: Sequence[str]) -> str:
    """The text with a word in the place of each <...>."""
    return _WORDS.sub("{}", text.replace("{", "{{").replace("}", "}}")).format(*words)


def _family(architecture: str, groups: list[str]) -> Family:
    said = kept("mopexec.weights", "architectures.yaml")
    table = {ours: place for name in groups for ours, place in _places(said["sets"][name])}
    copies = {copy: of for name in groups for copy, of in said["copies"].get(name, {}).items()}
    base, buffers = ("".join(said[part].get(name, "") for name in groups) for part in ("bare", "buffers"))
    return Family(
        architecture=architecture, table=table, copies=copies, writes_copies="mtp" in groups,
        base=base, buffers=buffers,
    )  # fmt: skip


FAMILIES: dict[str, Family] = {
    name: _family(name, groups)
    for name, groups in kept("mopexec.weights", "architectures.yaml")["tensors"].items()
}
