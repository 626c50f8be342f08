"""What a checkpoint's `.metadata` says of a tensor: boxes, each element in exactly one, and for each box the
bytes of one of the checkpoint's files. What breaks a rule is refused by name, box and field.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from mopsim.common.errors import MopError, shown

FILE = ".metadata"
Place = tuple[int, ...]
Box = tuple[Place, Place]
"""(first element, size)."""


def check_kinds(found: Any) -> Metadata:
    """`found`, which was read from FILE, if it is the description of a checkpoint. Raises MopError."""
    if not isinstance(found, Metadata):
        raise MopError(f"{FILE}: holds {_kind(found)}, not the Metadata of a checkpoint")
    for field in ("state_dict_metadata", "storage_data"):
        held = getattr(found, field, None)
        if not isinstance(held, dict):
            raise MopError(f"{FILE}: {field}: {_kind(held)} must be a dict")
    return found


def _kind(value: Any) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"


def tensor_of(described: Metadata, name: str) -> TensorStorageMetadata:
    """What is said of the tensor `name`. Raises MopError."""
    if name not in described.state_dict_metadata:
        raise MopError(f"{FILE}: {name}: is missing")
    found = described.state_dict_metadata[name]
    if not isinstance(found, TensorStorageMetadata):
        raise MopError(f"{FILE}: {name}: {_kind(found)} must be a TensorStorageMetadata")
    if not isinstance(getattr(found, "size", None), torch.Size):
        raise MopError(f"{FILE}: {name}: size: {_kind(getattr(found, 'size', None))} must be a torch.Size")
    return found


def check_tensor(described: Metadata, name: str, shape: Place, files: Mapping[str, int]) -> None:
    """Refuse a tensor that is of another shape, whose boxes do not hold each element once, or whose bytes
    are not those of a piece. files: bytes of each file of the checkpoint. Raises MopError."""
    found, field = tensor_of(described, name), f"{FILE}: {name}"
    if tuple(found.size) != shape:
        raise MopError(f"{field}: size: {list(found.size)} must be {list(shape)}")
    boxes = list(_boxes(getattr(found, "chunks", None), shape, f"{field}: chunks"))
    if wrong := not_once(boxes, shape):
        place, times = wrong
        holding = [told(box) for box in boxes if _holds(box, place)][:2]
        by = f"in {times} boxes, {' and '.join(holding)} among them" if times else "in no box"
        raise MopError(f"{field}: chunks: element {list(place)} of {list(shape)} is {by}, and must be in one")
    starts: set[tuple[str, int]] = set()
    for box in boxes:
        info = described.storage_data.get(MetadataIndex(name, box[0]))
        start = _stored(info, files, f"{field}: {told(box)}")
        if start in starts:
            raise MopError(f"{field}: {told(box)}: offset: {start[1]} in {start[0]} is another box's")
        starts.add(start)


def _boxes(chunks: Any, shape: Place, field: str) -> Iterable[Box]:
    """The boxes of a tensor of `shape`, each within it. Raises MopError."""
    if not isinstance(chunks, list):
        raise MopError(f"{field}: {_kind(chunks)} must be a list of boxes")
    for at, chunk in enumerate(chunks):
        if not isinstance(chunk, ChunkStorageMetadata):
            raise MopError(f"{field}[{at}]: {_kind(chunk)} must be a ChunkStorageMetadata")
        first, size = (getattr(chunk, part, None) for part in ("offsets", "sizes"))
        for part, value in (("offsets", first), ("sizes", size)):
            if not isinstance(value, torch.Size) or len(value) != len(shape):
                rule = f"must be {len(shape)} integers, as the shape {list(shape)} is"
                raise MopError(f"{field}[{at}]: {part}: {shown(value)} {rule}")
        box = tuple(cast(torch.Size, first)), tuple(cast(torch.Size, size))
        for start, length, whole in zip(*box, shape, strict=True):
            if length < min(1, whole) or start < 0 or start + length > whole:
                rule = f"is empty or not within the shape {list(shape)}"
                raise MopError(f"{field}[{at}]: {told(box)} {rule}")
        yield box


def told(box: Box) -> str:
    """'the box of [2, 3] from [0, 3] on'."""
    first, size = box
    return f"the box of {list(size)} from {list(first)} on"


def _holds(box: Box, place: Place) -> bool:
    return all(start <= at < start + length for at, start, length in zip(place, *box, strict=True))


def not_once(boxes: Iterable[Box], shape: Place) -> tuple[Place, int] | None:
    """The first element of `shape` that is not in exactly one of the boxes, which lie within it, and in how
    many it is; None where there is none.

    How many boxes hold an element, less the one that should, is a function of its place that is 0 everywhere
    if and only if its differences along all dimensions are. Of a box these are +1 or -1 at its corners, so
    no two boxes need be compared. Where they are not 0 at first, in lexical order, all before is
    0: they are the function's value there.
    """
    every = [((0,) * len(shape), shape), *boxes]
    first, size = (torch.tensor([box[part] for box in every], dtype=torch.int64) for part in (0, 1))
    strides = [math.prod(n + 1 for n in shape[at + 1 :]) for at in range(len(shape))]
    signs = torch.ones(1, len(every), dtype=torch.int64)
    signs[0, 0] = -1  # of the one box that should hold all
    places = (first * torch.tensor(strides, dtype=torch.int64)).sum(1)[None]
    for at, stride in enumerate(strides):
        places = torch.cat((places, places + size[:, at] * stride))
        signs = torch.cat((signs, -signs))
    found, inverse = torch.unique(places.flatten(), return_inverse=True)  # sorted
    sums = torch.zeros_like(found).index_add_(0, inverse, signs.flatten())
    wrong = sums.nonzero()
    if not len(wrong):
        return None
    place = int(found[wrong[0, 0]])
    element = tuple(place // stride % (n + 1) for stride, n in zip(strides, shape, strict=True))
    return element, 1 + int(sums[wrong[0, 0]])


def _stored(info: Any, files: Mapping[str, int], field: str) -> tuple[str, int]:
    """Where a box's bytes begin: in which file, at which byte. Raises MopError."""
    if not isinstance(info, _StorageInfo):
        raise MopError(f"{field}: storage_data: {_kind(info)} must say where its bytes are")
    name, offset, length, transforms = (
        getattr(info, part, None) for part in ("relative_path", "offset", "length", "transform_descriptors")
    )
    if not isinstance(name, str) or name not in files:
        raise MopError(f"{field}: relative_path: {shown(name)} is none of the checkpoint's files")
    for part, value, least in (("offset", offset, 0), ("length", length, 1)):
        if type(value) is not int or value < least:
            raise MopError(f"{field}: {part}: {shown(value)} must be an integer of at least {least}")
    start, count = cast(int, offset), cast(int, length)
    if start + count > files[name]:
        rule = f"with offset {shown(start)} ends beyond the {files[name]} bytes of {name}"
        raise MopError(f"{field}: length: {shown(count)} {rule}")
    if transforms:
        raise MopError(f"{field}: transform_descriptors: {shown(transforms)} must be none")
    return name, start
