"""What `.metadata` says is checked before anything is read: each broken rule is one line that names it."""

import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save

from mopexec.run import checkpoint_reader
from mopexec.run.described import not_once
from mopexec.run.shards import ParameterPieces, Piece
from tests.together import together

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
SHAPE, HALF = (6, 4), (3, 4)
FULL = torch.arange(24.0).view(SHAPE)
Edit = Callable[[Metadata], Any]


def pieces(full: torch.Tensor) -> ParameterPieces:
    return ParameterPieces.of([Piece((0, 0), full[:3]), Piece((3, 0), full[3:])], SHAPE, full)


def written(path: Path, *, flat: bool = False) -> Metadata:
    own = pieces(FULL.clone())
    state = {"w": own.in_flat_order() if flat else own, "other": FULL[:2].clone()}
    save(state, storage_writer=FileSystemWriter(path), no_dist=True)
    found: Metadata = pickle.loads((path / ".metadata").read_bytes())
    return found


def refusal(path: Path, content: Any, files: list[str] | None = None) -> str:
    (path / ".metadata").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    with pytest.raises(CheckpointException) as error:
        checkpoint_reader.read(path, {"w": pieces(torch.zeros(SHAPE))}, files, alone=True)
    (failure,) = error.value.failures.values()
    return str(failure[0])


def chunks_of(described: Metadata) -> list[ChunkStorageMetadata]:
    saved = described.state_dict_metadata["w"]
    assert isinstance(saved, TensorStorageMetadata)
    return saved.chunks


def box(described: Metadata, place: int, first: tuple[int, ...], size: tuple[int, ...]) -> None:
    """The box at `place` is elsewhere, its bytes the same."""
    chunks = chunks_of(described)
    index = MetadataIndex("w", chunks[place].offsets)
    described.storage_data[MetadataIndex("w", first)] = described.storage_data[index]
    chunks[place] = ChunkStorageMetadata(torch.Size(first), torch.Size(size))


def stored(**fields: Any) -> Edit:
    def edit(described: Metadata) -> None:
        index = MetadataIndex("w", (0, 0))
        described.storage_data[index] = replace(described.storage_data[index], **fields)

    return edit


def tensor(**fields: Any) -> Edit:
    return lambda described: vars(described.state_dict_metadata["w"]).update(fields)


def by_name(value: Any) -> Edit:
    return lambda described: described.state_dict_metadata.update(w=value)


def same_bytes(name: str, *first: int) -> Edit:
    """The first box's bytes are those of another."""
    index = MetadataIndex("w", (0, 0))
    return lambda one: one.storage_data.update({index: one.storage_data[MetadataIndex(name, first)]})


W, FIRST = ".metadata: w: ", ".metadata: w: the box of [3, 4] from [0, 0] on: "
EDITS: dict[str, Edit] = {
    W + "chunks: element [3, 0] of [6, 4] is in no box": lambda one: chunks_of(one).pop(),
    W + "chunks: element [0, 0] of [6, 4] is in 2 boxes, the box": lambda one: box(one, 1, (0, 0), HALF),
    W + "chunks: element [2, 0] of [6, 4] is in 2 boxes": lambda one: box(one, 1, (2, 0), HALF),
    W + "chunks: element [3, 1] of [6, 4] is in no box": lambda one: box(one, 1, (3, 0), (3, 1)),
    W + "chunks[1]: the box of [3, 4] from [4, 0] on is empty or not": lambda one: box(one, 1, (4, 0), HALF),
    W + "chunks[0]: the box of [3, 4] from [-1, 0] on is empty": lambda one: box(one, 0, (-1, 0), HALF),
    W + "chunks[0]: the box of [0, 0] from [0, 0] on is empty": lambda one: box(one, 0, (0, 0), (0, 0)),
    W + "chunks[0]: the box of [-1, 4] from [0, 0] on is": lambda one: box(one, 0, (0, 0), (-1, 4)),
    W + "chunks[0]: offsets: torch.Size([0]) must be 2 integers": lambda one: box(one, 0, (0,), (3,)),
    W + "chunks: element [0, 0] of [6, 4] is in no box": tensor(chunks=[]),
    W + "chunks: None must be a list of boxes": tensor(chunks=None),
    W + "chunks[0]: a value of type int must be a Chunk": tensor(chunks=[1]),
    W + "size: None must be a torch.Size": tensor(size=None),
    W + "size: [7, 4] must be [6, 4]": tensor(size=torch.Size((7, 4))),
    W + "is missing": lambda one: one.state_dict_metadata.pop("w"),
    W + "a value of type BytesStorageMetadata must be a T": by_name(BytesStorageMetadata()),
    ".metadata: storage_data: None must be a dict": lambda one: setattr(one, "storage_data", None),
    FIRST + "storage_data: None must say where": lambda one: one.storage_data.pop(MetadataIndex("w", (0, 0))),
    FIRST + "relative_path: '../../etc/passwd' is none of": stored(relative_path="../../etc/passwd"),
    FIRST + "relative_path: '/etc/passwd' is none of": stored(relative_path="/etc/passwd"),
    FIRST + "relative_path: 5 is none of": stored(relative_path=5),
    FIRST + "offset: None must be an integer of at least 0": stored(offset=None),
    FIRST + "offset: -5 must be": stored(offset=-5),
    FIRST + "length: 0 must be an integer of at least 1": stored(length=0),
    FIRST + "length: 'x' must be": stored(length="x"),
    FIRST + "length: 99999999 with offset 0 ends beyond": stored(length=99999999, offset=0),
    FIRST + "transform_descriptors: ['zstd'] must be none": stored(transform_descriptors=["zstd"]),
    ".metadata: w: the box of [3, 4] from [3, 0] on: offset:": same_bytes("w", 3, 0),
    "__0_0.distcp: w: the box of [3, 4] from [0, 0] on: [2, 4] lies at": same_bytes("other", 0, 0),
    "__0_0.distcp: w: the box of [3, 4] from [0, 0] on: offset 0 and length 9": stored(offset=0, length=9),
}  # fmt: skip


@pytest.mark.parametrize("line", EDITS)
def test_a_broken_rule_is_named(line: str, tmp_path: Path) -> None:
    described = written(tmp_path)
    EDITS[line](described)
    assert refusal(tmp_path, described).startswith(line)


@pytest.mark.parametrize(
    ("first", "size", "why"),
    [((5,), (12,), "element [5] of [24] is in 2 boxes"), ((12,), (11,), "element [23] of [24] is in no box"),
     ((13,), (12,), "[1]: the box of [12] from [13] on is empty or not within")],
)  # fmt: skip
def test_intervals_of_the_second_format_are_checked_too(
    first: tuple[int], size: tuple[int], why: str, tmp_path: Path
) -> None:
    described = written(tmp_path, flat=True)
    box(described, 1, first, size)
    assert why in refusal(tmp_path, described)


DAMAGED = {
    "empty": (b"", "is no description of a checkpoint: Ran out of input"),
    "cut": (pickle.dumps(Metadata({}))[:40], "is no description of a checkpoint: "),
    "an int": (pickle.dumps(5), "holds a value of type int, not the Metadata"),
    "another class": (pickle.dumps(torch.Size([1])), "holds a value of type Size, not the Metadata"),
    "code": (pickle.dumps(random.Random), "is no description of a checkpoint: .metadata names random.Random"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_description_is_one_line(
    what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """torch logs two tracebacks for what its reader raises."""
    written(tmp_path)
    content, why = DAMAGED[what]
    assert refusal(tmp_path, content).startswith(f".metadata: {why}")
    assert not [one for one in caplog.records if one.levelname == "WARNING"]
    assert capfd.readouterr().err == ""


def test_an_absent_description_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(CheckpointException) as error:
        checkpoint_reader.read(tmp_path, {"w": pieces(torch.zeros(SHAPE))}, alone=True)
    (failure,) = error.value.failures.values()
    assert str(failure[0]) == ".metadata: No such file or directory"
    assert not [one for one in caplog.records if one.levelname == "WARNING"]


def test_only_files_of_the_checkpoint_are_read(tmp_path: Path) -> None:
    described = written(tmp_path)
    assert "'__0_0.distcp' is none of the checkpoint's files" in refusal(tmp_path, described, [".metadata"])


@together(range(60))
def test_the_first_element_that_is_not_in_one_box(seed: int) -> None:
    """As counting shows it."""
    draw = random.Random(seed)
    shape = tuple(draw.randint(1, 4) for _ in range(draw.randint(0, 3)))
    boxes = []
    for _ in range(draw.randint(0, 4)):
        first = tuple(draw.randint(0, n - 1) for n in shape)
        boxes.append((first, tuple(draw.randint(1, n - at) for n, at in zip(shape, first, strict=True))))
    times = torch.zeros(shape, dtype=torch.int64)
    for first, size in boxes:
        times[tuple(slice(at, at + n) for at, n in zip(first, size, strict=True))] += 1
    wrong = [(place, int(times[place])) for place in product(*map(range, shape)) if times[place] != 1]
    assert not_once(boxes, shape) == (wrong[0] if wrong else None)
