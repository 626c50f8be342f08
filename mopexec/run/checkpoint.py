"""Checkpoints: written aside by torch.distributed.checkpoint, renamed when complete, so a half one is never
met.

run.json says what the checkpoint belongs to, and the SHA-256 of every other file: a changed byte is seen
when it is read. Tensors do not depend on the runtime or on the number of ranks (`mopexec.run.shards`).
"""

import json
import pickle
import re
import shutil
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from mopexec.distributed.collectives import of_all
from mopexec.run.checkpoint_reader import read
from mopexec.run.state import RunState, check_state
from mopsim.common import io
from mopsim.common.errors import MopError, shown
from mopsim.common.units import format_bytes

_NAME = re.compile(r"step_(\d{8})")
_META = "run.json"
_UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    pickle.UnpicklingError,
    CheckpointException,
)
_ARCHIVE = "inline_container"  # torch's archive writer says where in its source a write fell short, not why


class UnreadableCheckpointError(MopError):
    """A checkpoint whose tensors cannot be read."""


class Written(Protocol):
    """What a checkpoint is made of: sharded tensors."""

    def state_dict(self) -> dict[str, Any]: ...


class Stateful(Written, Protocol):
    """The part of a runner that a checkpoint needs: its sharded tensors, and putting them back."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint below `root`, or None."""
    complete = _complete(root)
    return complete[-1] if complete else None


def _complete(root: Path) -> list[Path]:
    return [path for path in _named(root) if (path / _META).is_file()]


def _named(root: Path) -> list[Path]:
    """Directories of checkpoints below `root`, whether whole or not, the oldest first."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if _NAME.fullmatch(path.name))


def later_than(root: Path, step: int) -> set[Path]:
    """Directories of checkpoints below `root` of more than `step` steps, whether whole or not."""
    return {path for path in _named(root) if path.name > _name(step)}


def _name(step: int) -> str:
    return f"step_{step:08d}"


def read_state(path: Path) -> RunState:
    """What the checkpoint at `path` belongs to. Raises MopError."""
    if not (path / _META).is_file():
        raise MopError(f"checkpoint {path}: {_META} is missing")
    state = io.load(path / _META, RunState, "checkpoint")
    if _name(state.step) != path.name:
        raise MopError(f"checkpoint {path}: {_META}: step: {state.step} is not that of the directory's name")
    for name in state.files:
        if Path(name).name != name or name == _META:
            raise MopError(f"checkpoint {path}: {_META}: files: {shown(name)} is no name of a file beside it")
    if state.format > 1 and not state.files:
        raise MopError(f"checkpoint {path}: {_META}: files: none is named, and it has some")
    return state


def newest_state(
    run: Path, option: str = "--resume", *, files: bool = False
) -> tuple[Path, RunState, list[str]] | None:
    """The newest checkpoint of the run in `run` whose run.json can be read, what it says, and why newer ones
    were passed over; None where there is no checkpoint. option: that asks for it. files: its other files must
    be as they were written too. Raises MopError where none can be read.
    """
    passed: list[str] = []
    for path in reversed(_named(run / "checkpoints")):
        try:
            state = read_state(path)
            if files:
                _check_alone(path, state)
            return path, state, passed
        except MopError as error:
            passed.append(str(error))
    if passed:
        raise MopError(f"{option}: {_none_of(passed)}")
    return None


def _check_alone(path: Path, state: RunState) -> None:
    """Refuse a checkpoint whose files are not as they were written, without the other ranks."""
    if problem := _attempt(lambda: _check_files(path, state.files.items())):
        raise MopError(f"checkpoint {path}: {problem}")


def _none_of(passed: list[str]) -> str:
    if len(passed) == 1:
        return f"the only checkpoint cannot be read: {passed[0]}"
    return f"none of the {len(passed)} checkpoints can be read; the newest: {passed[0]}"


def check_resumable(run: Path, wanted: RunState, steps: int) -> Path | None:
    """The newest checkpoint of the run in `run` that says what it belongs to, None where there is
    none. Refuses another run's, and one already at `steps` unless its files are damaged and an older one's
    are not.
    """
    found = newest_state(run)
    if found is not None and found[1].step >= steps:
        found = newest_state(run, files=True)
    if found is None:
        return None
    path, state, _ = found
    check_state(state, wanted, path)
    if state.step >= steps:
        raise MopError(f"--steps: {steps} is not more than the {state.step} that checkpoint {path} has done")
    return path


def save(
    root: Path,
    runner: Written,
    state: RunState,
    *,
    keep: int,
    passed: Collection[Path] = (),
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write one checkpoint on all ranks together; returns its directory. Of those of fewer steps, complete
    ones are removed but for the newest keep - 1, and all of `passed`: what the run could not resume from.
    Those of more steps stay. group: that ranks agree over (None = the default one).

    Raises MopError on every rank when it cannot be written (disk full); what was complete before stays as it
    was.
    """
    final = root / _name(state.step)
    aside = root / f".writing_{final.name}"
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(aside, ignore_errors=True)
    problem = _attempt(lambda: root.mkdir(parents=True, exist_ok=True)) if first else ""
    problem = _agree(problem, group) or _agree(_attempt(lambda: _write(aside, runner, group)), group)
    files: dict[str, str] = {}
    problem = problem or _attempt(lambda: files.update(_checksums(aside, group)))
    if not problem and first:
        complete = msgspec.structs.replace(state, files=files)
        problem = _attempt(lambda: _complete_directory(aside, final, complete))
    if problem := _agree(problem, group):
        if first:
            shutil.rmtree(aside, ignore_errors=True)
        older = _older(root, final, passed)
        rest = f"the last complete one is {older[-1]}" if older else "there is no earlier one"
        raise MopError(f"checkpoint {final}: cannot be written: {problem}; {rest}")
    if first:
        unread = [path for path in passed if path.name < final.name]
        for path in unread + [*_older(root, final, passed), final][:-keep]:
            shutil.rmtree(path, ignore_errors=True)
    return final


def _older(root: Path, final: Path, passed: Collection[Path]) -> list[Path]:
    """Complete checkpoints of fewer steps than `final` that are not among `passed`, the oldest first."""
    return [path for path in _complete(root) if path.name < final.name and path not in passed]


def load(path: Path, runner: Stateful) -> None:
    """Put the checkpoint at `path` into the runner (in place, on all ranks together), and this rank's random
    state where as many ranks wrote it. Raises MopError, naming the file, for one that is damaged.
    """
    written_by = read_state(path)
    if problem := _agree(_attempt(lambda: _check_files(path, _share(sorted(written_by.files.items()))))):
        raise MopError(f"checkpoint {path}: {problem}")
    state = runner.state_dict()
    if own_random_state := written_by.world_size == dist.get_world_size():
        state[_rng_key()] = torch.get_rng_state()
    try:
        read(path, state, written_by.files)
    except _UNREADABLE as error:
        raise MopError(f"checkpoint {path}: cannot be read: {_root_cause(error)}") from None
    if own_random_state:
        torch.set_rng_state(state.pop(_rng_key()))
    runner.load_state_dict(state)


def read_alone(path: Path, state: dict[str, Any]) -> None:
    """Fill the tensors of `state` from the checkpoint at `path` in one process without ranks."""
    files = read_state(path).files
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # torch: there are no ranks
            read(path, state, files, alone=True)
    except _UNREADABLE as error:
        raise UnreadableCheckpointError(f"checkpoint {path}: cannot be read: {_root_cause(error)}") from None


def load_newest(root: Path, runner: Stateful) -> tuple[Path, int, list[str]]:
    """(checkpoint, steps done, what was passed over and why): the newest below `root` that all ranks can
    read. Raises MopError where there is none.
    """
    passed: list[str] = []
    for path in reversed(_named(root)):
        problem = _agree(_attempt_load(path, runner))
        if not problem:
            return path, read_state(path).step, passed
        passed.append(problem)
    raise MopError(f"--resume: {_none_of(passed)}")


def _attempt_load(path: Path, runner: Stateful) -> str:
    try:
        load(path, runner)
    except MopError as error:
        return str(error)
    return ""


def _write(aside: Path, runner: Written, group: dist.ProcessGroup | None) -> None:
    try:
        save_tensors(tensors(runner), checkpoint_id=str(aside), process_group=group)
    except (OSError, RuntimeError, CheckpointException) as error:
        cause = _root_cause(error)
        if _ARCHIVE in cause:
            free = format_bytes(shutil.disk_usage(aside.parent).free)
            cause = f"the disk is full, or a quota or a limit on file sizes is reached ({free} free)"
        raise MopError(cause) from None


def tensors(runner: Written) -> dict[str, Any]:
    """The runner's tensors and, if it has none, this rank's RNG state of now under a name of its own."""
    return {_rng_key(): torch.get_rng_state(), **runner.state_dict()}


def _rng_key() -> str:
    return f"rng.rank{dist.get_rank()}"


def _checksums(directory: Path, group: dist.ProcessGroup | None) -> dict[str, str]:
    """SHA-256 by name of every file that the ranks wrote, on every rank; each hashes its share."""
    mine: dict[str, str] = {}

    def hash_share() -> None:
        mine.update({one.name: io.file_digest(one) for one in _share(sorted(directory.iterdir()))})

    problem = _attempt(hash_share)
    everyone = of_all((problem, mine), group)
    if problem := next((found for found, _ in everyone if found), ""):
        raise MopError(problem)
    return {name: digest for _, sums in everyone for name, digest in sums.items()}


def _check_files(path: Path, files: Iterable[tuple[str, str]]) -> None:
    """Hold files against their SHA-256, as run.json has it. Raises MopError naming the file."""
    for name, wanted in files:
        file = path / name
        if not file.is_file():
            raise MopError(f"{name} is missing")
        if io.file_digest(file) != wanted:
            raise MopError(f"{name} is not as it was written (its SHA-256 differs)")


def _share(items: list[Any]) -> list[Any]:
    """This rank's part of `items`."""
    return items[dist.get_rank() :: dist.get_world_size()]


def _complete_directory(aside: Path, final: Path, state: RunState) -> None:
    io.write_text(aside / _META, json.dumps(io.to_plain(state)) + "\n")
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)


def _attempt(action: Any) -> str:
    """'' where `action` works, else why it did not, in one line."""
    try:
        action()
    except (OSError, RuntimeError, MopError, CheckpointException) as error:
        return _root_cause(error)
    return ""


def _root_cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).strip().splitlines()[0]


def _agree(problem: str, group: dist.ProcessGroup | None = None) -> str:
    """The first rank's problem, or another's, on every rank: '' only where all succeeded."""
    return next((found for found in of_all(problem, group) if found), "")
