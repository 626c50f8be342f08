"""torch's reader of checkpoints, which runs no code that a file names and reads each piece once."""

import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.futures import Future

from mopexec.run.described import FILE, check_kinds, check_tensor, tensor_of, told
from mopexec.run.shards import ParameterPieces
from mopsim.common.errors import MopError


def read(
    path: Path, state: dict[str, Any], files: Collection[str] | None = None, *, alone: bool = False
) -> None:
    """Fill the tensors of `state` from the checkpoint at `path`, on all ranks together or alone. files: names
    of those that are read, None = all that lie there."""
    reader = Reader(path)
    load_tensors(
        state, checkpoint_id=str(path), storage_reader=reader, planner=_Planner(reader, files), no_dist=alone
    )


class Reader(FileSystemReader):
    """torch's reader; the pickled `.metadata` may name the classes that torch writes there, and no others.
    torch reads a whole piece of the file for each part of it that is asked for, this one once for all."""

    described = Metadata({}, storage_data={})
    problem = ""

    def read_metadata(self) -> Metadata:
        """torch writes a traceback for what is raised here, and looks for files that no checkpoint has: so
        the planner raises `problem`."""
        try:
            with (Path(self.path) / FILE).open("rb") as file:
                self.described = check_kinds(_MetadataUnpickler(file).load())
        except MopError as error:
            self.problem = str(error)
        except OSError as error:
            self.problem = f"{FILE}: {error.strerror or error}"
        except Exception as error:  # whatever the bytes of a pickle bring about
            self.problem = f"{FILE}: is no description of a checkpoint: {str(error) or type(error).__name__}"
        return self.described

    def read_data(self, plan: LoadPlan, planner: Any) -> "Future[None]":
        wanted: dict[MetadataIndex, list[ReadItem]] = {}
        for item in plan.items:
            wanted.setdefault(item.storage_index, []).append(item)
        by_file: dict[str, list[MetadataIndex]] = {}
        for index in wanted:
            by_file.setdefault(self.storage_data[index].relative_path, []).append(index)
        for file, indices in by_file.items():
            with self.fs.create_stream(self.fs.concat_path(self.path, file), "rb") as stream:
                for index in sorted(indices, key=lambda index: self.storage_data[index].offset):
                    values = self._piece(stream, index)
                    for item in wanted[index]:
                        target = planner.resolve_tensor(item).detach()
                        target.copy_(narrow_tensor_by_index(values, item.storage_offsets, item.lengths))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _piece(self, stream: Any, index: MetadataIndex) -> Tensor:
        """The values of a box. Raises MopError."""
        saved = self.described.state_dict_metadata[index.fqn]
        assert isinstance(saved, TensorStorageMetadata)
        assert index.index is not None
        info, chunk = self.storage_data[index], saved.chunks[index.index]
        place = f"{info.relative_path}: {index.fqn}: {told((chunk.offsets, chunk.sizes))}"
        try:
            values = torch.load(self._slice_file(stream, info), map_location="cpu", weights_only=True)
        except Exception as error:  # whatever the bytes of an archive bring about
            why = str(error).strip().partition("\n")[0] or type(error).__name__
            at = f"offset {info.offset} and length {info.length} are no tensor's bytes"
            raise MopError(f"{place}: {at}: {why}") from None
        if not isinstance(values, Tensor) or values.size() != chunk.sizes:
            size = list(values.size()) if isinstance(values, Tensor) else type(values).__name__
            raise MopError(f"{place}: {size} lies at offset {info.offset}")
        return values


class _Planner(DefaultLoadPlanner):
    """torch's planner; what was written as intervals of a flat order (format 2) is read as such, and what is
    said of each tensor is checked before any is read."""

    def __init__(self, reader: Reader, files: Collection[str] | None) -> None:
        super().__init__()
        self.reader, self.files = reader, files

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        if self.reader.problem:
            raise MopError(self.reader.problem)
        super().set_up_planner(state_dict, metadata, is_coordinator)
        assert metadata is not None
        there = {path.name: path.stat().st_size for path in Path(self.reader.path).iterdir()}
        sizes = there if self.files is None else {name: there[name] for name in self.files if name in there}
        for name, held in self.state_dict.items():
            flat = len(tensor_of(metadata, name).size) == 1
            if flat and isinstance(held, ParameterPieces):
                held = self.state_dict[name] = held.in_flat_order()
            check_tensor(metadata, name, tuple(held.size()), sizes)


class _MetadataUnpickler(pickle.Unpickler):
    """Data classes of torch.distributed.checkpoint, shapes and dtypes: nothing that can run code."""

    _METADATA = (
        "Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata StorageMeta "
        "TensorProperties _MEM_FORMAT_ENCODING"
    )
    _ALLOWED = frozenset(
        {("torch.distributed.checkpoint.metadata", name) for name in _METADATA.split()}
        | {("pathlib", name) for name in ("Path", "PosixPath", "WindowsPath")}
        | {
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("torch", "Size"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f".metadata names {module}.{name}, which no checkpoint holds")
        return super().find_class(module, name)
