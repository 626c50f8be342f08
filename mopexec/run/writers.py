"""Metrics for the tools that people watch runs with, where these are installed."""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mopsim.common.errors import MopError
from mopsim.common.values import require_once

WRITERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
"""Name of each and the module that it needs."""


class Writer(Protocol):
    """Takes the numbers of each step."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check(names: Sequence[str]) -> None:
    """Refuse a writer that is not known, not installed or named twice. Raises MopError."""
    require_once(names, "--log-to")
    for name in names:
        if name not in WRITERS:
            raise MopError(f"--log-to: {name!r} is not one of {', '.join(WRITERS)}")
        if importlib.util.find_spec(name) is None:
            raise MopError(f"--log-to: {name} is not installed: pip install {name}")


def open_writers(names: Sequence[str], out: Path, settings: Mapping[str, Any]) -> list[Writer]:
    """Those asked for; files go below `out`. settings: of the run, for tools that show them."""
    return [_TensorBoard(out) if name == "tensorboard" else _Wandb(out, settings) for name in names]


class _TensorBoard:
    def __init__(self, out: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / "tensorboard"))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run of the directory's name; where it goes is for WANDB_PROJECT, WANDB_MODE and the like to say."""

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        wandb: Any = importlib.import_module("wandb")
        self._run = wandb.init(dir=str(out), name=out.name, config=dict(settings))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()
