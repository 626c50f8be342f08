"""torch's reader of checkpoints, which runs no code that a file names and reads each piece once."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.futures import Future

from mopexec.run.shards import ParameterPieces


def read(path: Path, state: dict[str, Any], *, alone: bool = False) -> None:
    """Fill the tensors of `state` from the checkpoint at `path`, on all ranks together or alone."""
    load_tensors(
        state, checkpoint_id=str(path), storage_reader=Reader(path), planner=_Planner(), no_dist=alone
    )


class _Planner(DefaultLoadPlanner):
    """torch's planner; what was written as intervals of a flat order (format 2) is read as such."""

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        assert metadata is not None
        for name, held in self.state_dict.items():
            saved = metadata.state_dict_metadata.get(name)
            flat = isinstance(saved, TensorStorageMetadata) and len(saved.size) == 1
            if flat and isinstance(held, ParameterPieces):
                self.state_dict[name] = held.in_flat_order()


class Reader(FileSystemReader):
    """torch's reader; the pickled `.metadata` may name the classes that torch writes there, and no others.
    torch reads a whole piece of the file for each part of it that is asked for, this one once for all."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata: Metadata = _MetadataUnpickler(file).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

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
                    piece = self._slice_file(stream, self.storage_data[index])
                    values = torch.load(piece, map_location="cpu", weights_only=True)
                    for item in wanted[index]:
                        target = planner.resolve_tensor(item).detach()
                        target.copy_(narrow_tensor_by_index(values, item.storage_offsets, item.lengths))
        done: Future[None] = Future()
        done.set_result(None)
        return done


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
