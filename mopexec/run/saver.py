"""When a run writes its checkpoints: at once, or in a thread of each rank while the next steps run.

In a thread the state is copied to the host first, and the next save waits for the one before. Ranks agree
over a process group of their own, and the directory is renamed when all have written, as
`mopexec.run.checkpoint` does it: a kill in between leaves the checkpoint before whole.
"""

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopexec.distributed.mesh import process_group
from mopexec.distributed.tiers import Platform
from mopexec.run import checkpoint
from mopexec.run.shards import ParameterPieces, Piece
from mopexec.run.state import RunState
from mopsim.common.errors import MopError

_NICE = 10
"""Of the thread that writes: it takes what time the steps leave."""


class Saver:
    """Checkpoints of one run below `root`, `done` steps after its first; background: see the module.

    Those of more steps that are there already are what the run could not resume from: they are not kept
    beyond the first that has more steps than they.
    """

    def __init__(
        self,
        root: Path,
        runner: checkpoint.Written,
        platform: Platform,
        *,
        keep: int,
        background: bool,
        done: int = 0,
    ) -> None:
        self._root, self._runner, self._platform, self._keep = root, runner, platform, keep
        self._group = process_group(backend="gloo") if background else None
        self._copy: _Copy | None = None
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None
        self._passed = checkpoint.later_than(root, done)
        self.last: Path | None = None

    def save(self, state: RunState) -> None:
        """Begin to write a checkpoint of now, on all ranks together. Raises MopError, also for what went
        wrong with the one before.
        """
        self.wait()
        if self._group is None:
            self._save(self._runner, state)
            return
        self._copy = self._copy or _Copy(self._platform)
        self._copy.take(checkpoint.tensors(self._runner))
        self._thread = threading.Thread(target=self._write, args=(state,), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written and nobody was told yet; other ranks learn it later."""
        return self._problem is not None

    def wait(self) -> None:
        """Until nothing is being written. Raises MopError where it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def _save(self, runner: checkpoint.Written, state: RunState) -> None:
        self.last = checkpoint.save(
            self._root, runner, state, keep=self._keep, passed=self._passed, group=self._group
        )
        self._passed = {path for path in self._passed if path.name > self.last.name}

    def _write(self, state: RunState) -> None:
        _step_aside()
        assert self._copy is not None
        try:
            self._platform.begin_thread()  # torch's writer asks for the current stream
            self._save(self._copy, state)
        except MopError as error:
            self._problem = error
        except Exception as error:
            self._problem = MopError(f"checkpoint of step {state.step}: {type(error).__name__}: {error}")


class _Copy:
    """The host's copy of a runner's state; its memory is kept from save to save."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._state: dict[str, Any] = {}

    def take(self, state: dict[str, Any]) -> None:
        """Copy; back when the copy is whole."""
        self._state = {name: self._copied(name, value) for name, value in state.items()}
        self._platform.synchronize()

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def _copied(self, name: str, value: Any) -> Any:
        kept = self._state.get(name)
        if isinstance(value, ParameterPieces):
            held = kept.pieces if isinstance(kept, ParameterPieces) else {}
            pieces = [Piece(at, self._into(held.get(at), values)) for at, values in value.pieces.items()]
            like = pieces[0].values if pieces else torch.empty(0, dtype=value.dtype)
            return ParameterPieces.of(pieces, value.whole, like)
        return self._into(kept, value)

    def _into(self, kept: Tensor | None, value: Tensor) -> Tensor:
        if kept is None or kept.shape != value.shape:
            kept = self._platform.host_empty(value.shape, value.dtype, "staging")
        rows = ((kept, value),) if value.is_contiguous() else zip(kept, value, strict=True)
        for row in rows:  # a copy of all at once would make one on the device first
            self._platform.copy(*row)
        return kept


def _step_aside() -> None:
    """Let this thread use every core, and none that a step needs (on Linux both are of a thread)."""
    with suppress(OSError, AttributeError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
