"""Safetensors files of a Hugging Face directory: one, or several with an index. Tensors are mapped, not read:
what is never touched is never loaded.
"""

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mopexec.weights.layout import Layout
from mopsim.common import io
from mopsim.common.errors import MopError, shown
from mopsim.common.json_text import read_object

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
"""Of weights, as config.json names them."""
FLOATS = ("BF16", "F16", "F32", "F64")


class _Index(msgspec.Struct):
    """File by tensor."""

    weight_map: dict[str, str]


class Files:
    """The tensors of a directory, by name. Raises MopError naming the file that cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.ignored: list[str] = []  # buffers beside the weights
        self._base = ""
        self._stored: dict[str, str] = {}  # names in the files, where they are others
        self._open: dict[Path, Any] = {}
        for path, listed in self._listed():
            for name in self._names(path):
                self.files[name] = path
            for name in listed:
                if self.files.get(name) != path:
                    raise MopError(f"{folder / INDEX}: {name}: is not in {path.name}, where the index has it")

    def of_family(self, base: str, buffers: str, known: Collection[str]) -> None:
        """Names as a family's files have them (see Family), of which `known` are this network's; buffers are
        none of them."""
        self._base = base
        for stored, path in list(self.files.items()):
            plain = stored.removeprefix(base)
            if buffers and stored not in known and re.fullmatch(buffers, plain):
                del self.files[stored]
                self.ignored.append(stored)
            elif base and stored == plain and stored not in known and f"{base}{plain}" not in self.files:
                del self.files[stored]
                self.files[f"{base}{plain}"], self._stored[f"{base}{plain}"] = path, stored

    def called(self, name: str) -> str:
        """A tensor as these files call it, or would, where they have not got it."""
        bare = bool(self._stored) and name not in self.files
        return self._stored.get(name, name.removeprefix(self._base) if bare else name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Of a tensor, in safetensors' words: BF16, F32, ..."""
        return str(self._slice(name).get_dtype())

    def tensor(self, name: str) -> Tensor:
        """A tensor, mapped from its file."""
        found: Tensor = self._file(name).get_tensor(self._stored.get(name, name))
        return found

    def close(self) -> None:
        """Unmap everything."""
        for path in list(self._open):
            self._open.pop(path).__exit__(None, None, None)

    def _listed(self) -> list[tuple[Path, list[str]]]:
        """The files, and what the index says they hold."""
        if (self.folder / INDEX).is_file():
            path = self.folder / INDEX
            try:
                index = msgspec.json.decode(io.read_text(path), type=_Index)
            except (msgspec.DecodeError, RecursionError):
                raise MopError(f"{path}: weight_map: must map tensors to files") from None
            names: dict[str, list[str]] = {}
            for tensor, file in index.weight_map.items():
                names.setdefault(file, []).append(tensor)
            return [(self.folder / file, listed) for file, listed in sorted(names.items())]
        if (self.folder / SINGLE).is_file():
            return [(self.folder / SINGLE, [])]
        raise MopError(f"--init-from: {self.folder}: holds neither {SINGLE} nor {INDEX}")

    def _names(self, path: Path) -> list[str]:
        if not os.path.isfile(path):  # also where the system takes no such name
            raise MopError(f"{self.folder / INDEX}: {path.name}: no such file")
        try:
            self._open[path] = safe_open(str(path), framework="pt").__enter__()  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError) as error:
            raise MopError(f"{path}: is not a safetensors file: {error}") from None
        return list(self._open[path].keys())

    def _slice(self, name: str) -> Any:
        return self._file(name).get_slice(self._stored.get(name, name))

    def _file(self, name: str) -> Any:
        return self._open[self.files[name]]


class Weights:
    """Parameters read from a Hugging Face directory, every tensor accounted for. Raises MopError."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.layout, self.files = layout, Files(folder)
        names = layout.wanted().keys() | layout.copies().keys()
        self.files.of_family(layout.family.base, layout.family.buffers, names)
        check(self.files, layout)

    def read(
        self, name: str, shape: tuple[int, ...], index: int | None, dim: int, start: int, stop: int
    ) -> Tensor:
        """Part [start, stop) along `dim` of a parameter (of its expert `index`, whose shape is `shape`).
        Raises MopError where a value of it is not finite."""
        tensor = self.layout.tensor(name, index)
        view = self.layout.view(name, index, self.files.tensor(tensor))
        assert tuple(view.shape) == tuple(shape), f"{name}: {tuple(view.shape)} is not {shape}"
        return self._finite(view.narrow(dim, start, stop - start), tensor)

    def buffer(self, name: str) -> Tensor | None:
        """A buffer, or None where the files have none. Raises MopError as `read`."""
        if self.layout.place(name) is None:
            return None
        tensor = self.layout.tensor(name)
        return self._finite(self.layout.view(name, None, self.files.tensor(tensor)), tensor)

    def said_ignored(self) -> str:
        """The line that tells which tensors of the files are not read; empty where all are."""
        names = self.files.ignored
        if not names:
            return ""
        more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        return f"--init-from: {self.files.folder}: {names[0]}{more}: buffers, no weights: ignored"

    def _finite(self, values: Tensor, tensor: str) -> Tensor:
        """The values, read from `tensor`. Raises MopError where one is not finite."""
        if values.numel() and not torch.stack(values.aminmax()).isfinite().all():
            said = f"{self.files.files[tensor]}: {self.files.called(tensor)}"
            raise MopError(f"{said}: holds values that are not finite: weights must be finite numbers")
        return values


def check(files: Files, layout: Layout) -> None:
    """Raise MopError for the first tensor that is missing, that no parameter is read from, or that has
    another shape, no floating-point numbers, or others than the one that it is a copy of.
    """
    wanted, copies = layout.wanted(), layout.copies()
    for name, want in wanted.items():
        if name not in files.files:
            raise MopError(f"{files.folder}: {files.called(name)}: missing; {want.parameter} is read from it")
    for name, path in files.files.items():
        said = f"{path}: {files.called(name)}"
        if name not in wanted and name not in copies:
            architecture = layout.family.architecture
            raise MopError(f"{said}: is no tensor of this {architecture} (config.json)")
        shape = wanted[copies.get(name, name)].shape
        if files.shape(name) != shape:
            raise MopError(f"{said}: shape {list(files.shape(name))} is not {list(shape)}")
        if files.dtype(name) not in FLOATS:
            rule = f"only {', '.join(FLOATS)} are read: dequantise the weights first"
            raise MopError(f"{said}: dtype {files.dtype(name)}: {rule}")
    for copy in copies.keys() & files.files.keys():
        one, other = files.tensor(copy), files.tensor(copies[copy])
        if not one.equal(other.to(one.dtype)):
            rule = f"differs from {files.called(copies[copy])}, which this network (config.json) has for both"
            raise MopError(f"{files.files[copy]}: {files.called(copy)}: {rule}")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a directory. Raises MopError where it is none, says a dtype that weights
    have not, or they are quantised."""
    path = folder / "config.json"
    config = read_object(path, "--init-from")
    if config.get("quantization_config"):
        raise MopError(f"{path}: quantization_config: quantised weights are not read: dequantise them first")
    for key in ("dtype", "torch_dtype"):
        dtype = config.get(key)
        if dtype is not None and not (isinstance(dtype, str) and dtype in DTYPES):
            raise MopError(f"{path}: {key}: {shown(dtype)} must be one of {', '.join(DTYPES)}")
    return config
