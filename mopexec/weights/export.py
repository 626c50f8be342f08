"""The newest checkpoint of a run as a Hugging Face directory: safetensors, config.json, tokenizer.

One process reads piece by piece what a file holds, so no more than a file's tensors are in memory; it
needs neither the ranks nor the device that trained.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mopexec.model.initialize import is_stacked
from mopexec.run import checkpoint, kept, plans
from mopexec.run.checkpoint import UnreadableCheckpointError
from mopexec.run.shards import ParameterPieces, Piece
from mopexec.run.state import check_format
from mopexec.weights.begin import architecture, check_rate
from mopexec.weights.config import to_config
from mopexec.weights.files import DTYPES, INDEX, SINGLE, read_config
from mopexec.weights.layout import Layout
from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.common.io import Spec
from mopsim.common.outputs import whole_directory
from mopsim.spec.plan import Plan

FILE_BYTES = 5 * 10**9
"""Largest file, as transformers' save_pretrained has it, unless one tensor is larger."""


class Exported(Spec, frozen=True, kw_only=True):
    """What was written. bytes: of the tensors. step: optimizer steps of the checkpoint. passed: why newer
    checkpoints were passed over. tokenizer: whether one was written."""

    out: str
    checkpoint: str
    step: int
    architecture: str
    dtype: str
    tensors: int
    files: int
    bytes: int
    passed: list[str]
    tokenizer: bool


def export(run: Path, out: Path, dtype: str | None = None, file_bytes: int = FILE_BYTES) -> Exported:
    """Write the run's newest checkpoint to the new directory `out`.

    dtype: of the tensors; None: that of the weights that the run began with, else what it computes in.
    Raises MopError.
    """
    if not (run / "plan.yaml").is_file():
        raise MopError(f"--run: {run} is not the directory of a run of `mopexec train`: it has no plan.yaml")
    plan = plans.read_plan(run / "plan.yaml")
    if out.is_dir() and any(out.iterdir()):
        raise MopError(f"--out: {out} is not empty; give another directory")
    newest = checkpoint.newest_state(run, "--run", files=True)
    if newest is None:
        raise MopError(f"--run: {run} has no checkpoint to export")
    path, state, passed = newest
    check_format(state, path, "--run")
    config, layout, dtype = _target(run, plan, dtype)
    config.pop("dtype", None)
    check_biases(layout, path)
    writer = _Writer(layout, path, DTYPES[dtype], file_bytes)
    with whole_directory(out) as aside:
        tokenizer = kept.copy_into(aside, run)
        try:
            total, files = writer.write(aside)
        except SafetensorError as error:  # of a full disk
            reason = str(error).rpartition("I/O error: ")[2]
            raise MopError(f"--out: {out}: cannot be written: {reason}") from None
        io.write_text(aside / "config.json", json.dumps(config | {"torch_dtype": dtype}, indent=2) + "\n")
        for file in aside.glob("*.safetensors"):
            shutil.copymode(aside / "config.json", file)  # the library writes for its user alone
    return Exported(
        out=str(out), checkpoint=str(path), step=state.step, architecture=layout.family.architecture,
        dtype=dtype, tensors=len(writer.tensors), files=files, bytes=total,
        passed=passed, tokenizer=tokenizer,
    )  # fmt: skip


def _target(run: Path, plan: Plan, dtype: str | None = None) -> tuple[dict[str, Any], Layout, str]:
    """config.json, where each parameter lies, and the tensors' dtype. Raises MopError where Hugging Face's
    format does not say the plan's network.
    """
    folder = kept.folder_of(run)
    config = read_config(folder) if kept.began_with_weights(run) else to_config(plan.model)
    layout = Layout(plan.model, architecture(config, folder))
    dtype = dtype or config.get("dtype") or config.get("torch_dtype") or plan.strategy.precision.compute
    if dtype not in DTYPES:
        raise MopError(f"--dtype: {dtype!r} must be one of {', '.join(DTYPES)}")
    return config, layout, dtype


def check_exportable(run: Path, plan: Plan) -> None:
    """Refuse what `export` would refuse of a run of this plan in `run`, begun or not: the network, a balance
    bias that it moves or has moved. Raises MopError.
    """
    _, layout, _ = _target(run, plan)
    layout.wanted()
    check_rate(layout.family, plan)
    if newest := checkpoint.newest_state(run):
        with suppress(UnreadableCheckpointError):  # which training passes over
            check_biases(layout, newest[0])


def check_biases(layout: Layout, path: Path) -> None:
    """Refuse what the files would not say: a balance bias that moved, where they have no place for it."""
    values: dict[tuple[str, int | None], Tensor] = {
        (name, None): torch.zeros(shape) for name, shape in layout.buffers.items() if not layout.place(name)
    }
    _load(layout, path, values)
    moved = next((name for (name, _), value in values.items() if bool(value.any())), None)
    if moved:
        raise MopError(
            f"{moved}: is not zero in {path}, and {layout.family.architecture} has no place for a router's "
            "balance bias: only a run with --set bias_update_rate=0 from its first step is exported"
        )


def _load(layout: Layout, path: Path, values: Mapping[tuple[str, int | None], Tensor]) -> None:
    """Fill the values (of a parameter, of its expert, of a buffer) from the checkpoint at `path`."""
    state: dict[str, Any] = {}
    pieces: dict[str, list[Piece]] = {}
    for (name, expert), value in values.items():
        if name in layout.buffers:
            state[name] = value
        else:
            box = value if expert is None else value[None]
            pieces.setdefault(name, []).append(Piece((expert or 0, *[0] * (box.dim() - 1)), box))
    for name, parts in pieces.items():
        state[f"{name}.value"] = ParameterPieces.of(parts, layout.parameters[name], parts[0].values)
    if state:
        checkpoint.read_alone(path, state)


class _Writer:
    """The tensors of one checkpoint in the files of a directory."""

    def __init__(self, layout: Layout, path: Path, dtype: torch.dtype, file_bytes: int) -> None:
        self.layout, self.path, self.dtype, self.file_bytes = layout, path, dtype, file_bytes
        wanted = layout.wanted()
        self.tensors = {name: want.shape for name, want in wanted.items()}
        if layout.family.writes_copies:
            copied = {name: original for name, original in layout.copies().items() if original in wanted}
            self.copies = {name: original for name, original in copied.items() if "layers" in name}
        else:
            self.copies = {}
        self.tensors |= {name: wanted[original].shape for name, original in self.copies.items()}
        self.held: dict[str, list[tuple[str, int | None]]] = {}
        for name, shape in layout.held():
            for expert in range(shape[0]) if is_stacked(name) else (None,):
                self.held.setdefault(layout.tensor(name, expert), []).append((name, expert))

    def write(self, folder: Path) -> tuple[int, int]:
        """(bytes of all tensors, files)."""
        groups = list(self._groups())
        entries: dict[str, str] = {}
        for number, names in enumerate(groups):
            file = SINGLE if len(groups) == 1 else f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
            save_file(self._read(names), folder / file, metadata={"format": "pt"})
            entries |= dict.fromkeys(names, file)
        total = sum(map(self._bytes, self.tensors))
        if len(groups) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(entries.items()))}
            io.write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
        return total, len(groups)

    def _bytes(self, name: str) -> int:
        return math.prod(self.tensors[name]) * self._dtype(name).itemsize

    def _dtype(self, name: str) -> torch.dtype:
        """Balance biases are fp32, as they are in training."""
        held = self.held.get(name)
        return torch.float32 if held and held[0][0] in self.layout.buffers else self.dtype

    def _groups(self) -> Iterator[list[str]]:
        """Tensors in order, in groups of at most `file_bytes`."""
        group: list[str] = []
        size = 0
        for name in self.tensors:
            if group and size + self._bytes(name) > self.file_bytes:
                yield group
                group, size = [], 0
            group.append(name)
            size += self._bytes(name)
        yield group

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        """The tensors of one file, from the checkpoint."""
        found = {name: torch.empty(self.tensors[name], dtype=self._dtype(name)) for name in names}
        values: dict[tuple[str, int | None], Tensor] = {}  # a parameter and its copy are read once
        targets: list[tuple[Tensor, Tensor]] = []
        for name, tensor in found.items():
            for parameter, expert in self.held[self.copies.get(name, name)]:
                view = self.layout.view(parameter, expert, tensor)
                value = values.setdefault((parameter, expert), torch.empty(view.shape, dtype=torch.float32))
                targets.append((view, value))
        _load(self.layout, self.path, values)
        for view, value in targets:
            view.copy_(value)
        return found
