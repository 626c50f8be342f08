"""Checkpoints: written aside by torch.distributed.checkpoint, renamed when complete, so a half one is never
met.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from mopsim.common import io
from mopsim.common.errors import MopError, SpecError
from mopsim.common.io import Spec
from mopsim.common.units import format_bytes
from mopsim.spec.plan import Plan

_NAME = re.compile(r"step_(\d{8})")
_META = "run.json"
_ARCHIVE = "inline_container"  # torch's archive writer says where in its source a write fell short, not why


class RunState(Spec, frozen=True, kw_only=True):
    """What a checkpoint belongs to. `step`: optimizer steps done, which is the data position too."""

    step: int
    model: str
    model_digest: str
    strategy_digest: str
    world_size: int
    vocab_size: int
    seq_len: int
    global_batch: int
    seed: int
    text_digest: str


class Stateful(Protocol):
    """The part of a runner that a checkpoint needs: its sharded tensors, and putting them back."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def run_state(plan: Plan, step: int, seed: int, text_digest: str) -> RunState:
    """The state of a run of `plan` after `step` steps."""
    model, training = plan.model, plan.training
    return RunState(
        step=step,
        model=model.name,
        model_digest=io.digest(model),
        strategy_digest=io.digest(plan.strategy),
        world_size=plan.strategy.world_size,
        vocab_size=model.vocab_size,
        seq_len=training.seq_len,
        global_batch=training.global_batch,
        seed=seed,
        text_digest=text_digest,
    )


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint below `root`, or None."""
    complete = _complete(root)
    return complete[-1] if complete else None


def find(run: Path) -> Path:
    """The newest complete checkpoint of the run in `run`. Raises MopError where there is none."""
    found = latest(run / "checkpoints")
    if found is None:
        raise MopError(
            f"--resume: {run} has no complete checkpoint to go on from; begin again in another directory"
        )
    return found


def _complete(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if _NAME.fullmatch(p.name) and (p / _META).is_file())


def read_state(path: Path) -> RunState:
    """What the checkpoint at `path` belongs to. Raises MopError."""
    return io.load(path / _META, RunState, "checkpoint")


def check_state(found: RunState, wanted: RunState, path: Path) -> None:
    """Refuse to go on with a checkpoint of another model, vocabulary, world size, strategy, batch, seed or
    text.
    """
    for field, label in (
        ("vocab_size", "plan.model.vocab_size"),
        ("model", "plan.model.name"),
        ("model_digest", "plan.model (digest)"),
        ("world_size", "plan.strategy.world_size"),
        ("strategy_digest", "plan.strategy (digest)"),
        ("seq_len", "plan.training.seq_len"),
        ("global_batch", "plan.training.global_batch"),
        ("seed", "seed"),
        ("text_digest", "--data (digest)"),
    ):
        have, want = getattr(found, field), getattr(wanted, field)
        if have != want:
            raise SpecError(label, want, f"is not the {have!r} that checkpoint {path} was made with")


def check_resumable(path: Path, wanted: RunState, steps: int) -> int:
    """Steps done in the checkpoint at `path`. Refuses another run's, and one already at `steps`."""
    found = read_state(path)
    check_state(found, wanted, path)
    if found.step >= steps:
        raise MopError(f"--steps: {steps} is not more than the {found.step} that checkpoint {path} has done")
    return found.step


def save(root: Path, runner: Stateful, state: RunState, *, keep: int) -> Path:
    """Write one checkpoint on all ranks together; returns its directory. Older than `keep` complete ones are
    removed.

    Raises MopError on every rank when it cannot be written (disk full); what was complete before stays as it
    was.
    """
    final = root / f"step_{state.step:08d}"
    aside = root / f".writing_{final.name}"
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(aside, ignore_errors=True)
    problem = _attempt(lambda: root.mkdir(parents=True, exist_ok=True)) if first else ""
    problem = _agree(problem) or _agree(_attempt(lambda: _write(aside, runner)))
    if not problem and first:
        problem = _attempt(lambda: _complete_directory(aside, final, state))
    if problem := _agree(problem):
        if first:
            shutil.rmtree(aside, ignore_errors=True)
        older = latest(root)
        rest = f"the last complete one is {older}" if older else "there is no earlier one"
        raise MopError(f"checkpoint {final}: cannot be written: {problem}; {rest}")
    if first:
        for path in _complete(root)[:-keep]:
            shutil.rmtree(path, ignore_errors=True)
    return final


def load(path: Path, runner: Stateful) -> None:
    """Put the checkpoint at `path` into the runner (in place, on all ranks together) and restore the RNG
    state.
    """
    state = _tensors(runner)
    try:
        load_tensors(state, checkpoint_id=str(path))
    except (OSError, RuntimeError, ValueError, KeyError, CheckpointException) as error:
        raise MopError(f"checkpoint {path}: cannot be read: {_root_cause(error)}") from None
    torch.set_rng_state(state.pop(_rng_key()))
    runner.load_state_dict(state)


def load_newest(newest: Path, runner: Stateful) -> tuple[Path, int, list[str]]:
    """(checkpoint, steps done, what was passed over and why): `newest`, or where a rank cannot read it the
    newest before it that all can. Raises MopError where there is none.
    """
    passed: list[str] = []
    for path in reversed([one for one in _complete(newest.parent) if one.name <= newest.name]):
        problem = _agree(_attempt_load(path, runner))
        if not problem:
            return path, read_state(path).step, passed
        passed.append(problem)
    raise MopError(f"--resume: none of the {len(passed)} checkpoints can be read; the newest: {passed[0]}")


def _attempt_load(path: Path, runner: Stateful) -> str:
    try:
        load(path, runner)
    except MopError as error:
        return str(error)
    return ""


def _write(aside: Path, runner: Stateful) -> None:
    try:
        save_tensors(_tensors(runner), checkpoint_id=str(aside))
    except (OSError, RuntimeError, CheckpointException) as error:
        cause = _root_cause(error)
        if _ARCHIVE in cause:
            free = format_bytes(shutil.disk_usage(aside.parent).free)
            cause = f"the disk is full, or a quota or a limit on file sizes is reached ({free} free)"
        raise MopError(cause) from None


def _tensors(runner: Stateful) -> dict[str, Any]:
    """The runner's tensors and this rank's RNG state under a name of its own."""
    return {**runner.state_dict(), _rng_key(): torch.get_rng_state()}


def _rng_key() -> str:
    return f"rng.rank{dist.get_rank()}"


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


def _agree(problem: str) -> str:
    """The first rank's problem, or another's, on every rank: '' only where all succeeded."""
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((found for found in problems if found), "")
