"""torch's reader of checkpoints, which runs no code that a file names."""

import pickle
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta


class Reader(FileSystemReader):
    """torch's reader; the pickled `.metadata` may name the classes that torch writes there, and no others."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata: Metadata = _MetadataUnpickler(file).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


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
