"""How far each plan's context reaches under one device limit and one host limit.

Found by dry runs, confirmed by real steps with the limits enforced by the memory tracker.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from mopexec.run import failures
from mopsim.common.errors import MopError, SpecError
from mopsim.common.io import write_json, write_text, write_yaml
from mopsim.common.processes import end_with_parent
from mopsim.common.units import format_bytes
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import Plan

RealStep = Callable[[Plan, int, int], "StepOutcome"]


@dataclass(frozen=True)
class StepOutcome:
    """One real training step under the limits: whether it ran, what stopped it, tokens/s over all ranks."""

    ran: bool
    stopped_by: str | None
    message: str
    tokens_per_second: float | None
    peak_memory: int | None


@dataclass(frozen=True)
class Reach:
    """One plan's reach. longest, first_failing: tokens of one sequence (multiples of the quantum)."""

    strategy: str
    model: str
    world_size: int
    sequence_degree: int
    longest: int
    first_failing: int
    peak_memory: int
    host_memory: int
    stopped_by: str
    at_longest: StepOutcome | None
    at_first_failing: StepOutcome | None


@dataclass(frozen=True)
class Limits:
    """Bytes of one rank."""

    device: int
    host: int


_REFUSED = "the plan: "
"""What stopped a length that is refused whatever the memory begins with this."""


def with_seq_len(plan: Plan, seq_len: int) -> Plan:
    """The same plan at another sequence length; its prediction no longer holds and is dropped."""
    return msgspec.structs.replace(plan, training=plan.training.at_length(seq_len), prediction=None)


def reach(plan: Plan, limits: Limits, quantum: int, real_step: RealStep | None) -> Reach:
    """Find the longest sequence that fits, in multiples of `quantum` tokens; confirm both sides for real.

    Where not even one quantum fits the longest is 0. Raises MopError if a real step contradicts the dry run.
    """
    split = plan.strategy.attention.context_parallel
    if quantum % split:
        raise SpecError("quantum", quantum, f"is not a multiple of the sequence degree {split}")
    ends = Ends(limits, quantum)
    while not ends.met:
        _play(plan, ends, ends.following())
    low, high, stopper, (peak, host) = ends.low, ends.high, ends.stopper, ends.filled
    if not low and stopper.startswith(_REFUSED):
        raise MopError(f"{stopper} (at {high} tokens)")
    confirmed = [
        real_step(with_seq_len(plan, n), limits.device, limits.host) if real_step and tried else None
        for n, tried in ((low, low), (high, not stopper.startswith(_REFUSED)))
    ]
    found = Reach(
        plan.strategy.name, describe(plan.model), plan.strategy.world_size, split, low, high,
        peak, host, stopper, *confirmed,
    )  # fmt: skip
    _agree(found)
    return found


def describe(model: ModelSpec) -> str:
    """A network in one line, with the proportions that decide what fills the memory."""
    return (
        f"{model.name}: hidden {model.hidden_size}, {model.num_hidden_layers} layers, "
        f"vocabulary {model.vocab_size} ({model.vocab_size / model.hidden_size:.0f} x hidden), "
        f"{model.num_local_experts} experts of width {model.moe_intermediate_size}, "
        f"top-{model.num_experts_per_tok}"
    )


@dataclass
class Ends:
    """The longest length known to fit, `low` (0 always does), with (device, host) bytes there, and the
    shortest known not to, `high` (0: none yet), with what stopped it."""

    limits: Limits
    quantum: int
    low: int = 0
    high: int = 0
    filled: tuple[int, int] = (0, 0)
    stopper: str = ""
    _before: tuple[int, tuple[int, int]] | None = None
    _tried: int = 0

    @property
    def met(self) -> bool:
        """Whether nothing lies between."""
        return self.high - self.low == self.quantum

    def following(self) -> int:
        """The length to play next: where the two longest that fit say that a limit is met, as memory grows
        almost evenly; every third time the middle, or twice the longest."""
        self._tried += 1
        low, high, q = self.low, self.high, self.quantum
        usual = (low + high) // 2 if high else 2 * low
        wanted = self._full() if self._tried % 3 else usual
        return max(low + q, min(wanted, high - q if high else 4 * low) // q * q)

    def fits(self, length: int, filled: tuple[int, int]) -> None:
        """It does, with (device, host) bytes."""
        self._before, self.low, self.filled = (self.low, self.filled), length, filled

    def fails(self, length: int, stopper: str) -> None:
        """It does not."""
        self.high, self.stopper = length, stopper

    def _full(self) -> int:
        """Where a limit is met by the last two lengths that fit."""
        if self._before is None or not self._before[0]:
            return 2 * self.low
        before, less = self._before
        each = zip((self.limits.device, self.limits.host), self.filled, less, strict=True)
        ends = [
            self.low + (limit - now) * (self.low - before) // (now - then)
            for limit, now, then in each
            if now > then
        ]
        return min(ends, default=2 * self.low)


def _play(plan: Plan, ends: Ends, seq_len: int) -> None:
    """Tell the ends whether a dry run fits both limits, else the tier and category whose allocation crosses
    first, or the rule that the plan breaks at that length."""
    from mopexec.check.dry_run import dry_run
    from mopexec.measure.tracker import OutOfMemory

    try:
        found = dry_run(with_seq_len(plan, seq_len), 0, ends.limits.device, ends.limits.host)
    except OutOfMemory as error:
        ends.fails(seq_len, error.stopped_by)
    except SpecError as error:
        ends.fails(seq_len, f"{_REFUSED}{error}")
    else:
        ends.fits(seq_len, (found.peak_memory, found.host_memory))


def train_one_step(data: str) -> RealStep:
    """A real step through `mopexec train`: every rank, limits enforced, routing by the plan's profile."""

    def step(plan: Plan, device_limit: int, host_limit: int) -> StepOutcome:
        with tempfile.TemporaryDirectory(prefix="mop-reach-") as scratch:
            path, out = Path(scratch) / "plan.yaml", Path(scratch) / "run"
            write_yaml(path, plan)
            command = [
                sys.executable, "-m", "mopexec.cli", "train", "--plan", str(path), "--data", data,
                "--steps", "1", "--out", str(out),
                "--device-limit", str(device_limit), "--host-limit", str(host_limit),
                "--routing", "profile", "--profile-steps", "0", "--no-final-checkpoint",
            ]  # fmt: skip
            done = subprocess.run(
                command, capture_output=True, text=True, preexec_fn=partial(end_with_parent, os.getpid())
            )
            return _outcome(done, out)

    return step


def _outcome(done: "subprocess.CompletedProcess[str]", out: Path) -> StepOutcome:
    if done.returncode == 0:
        line = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        return StepOutcome(True, None, "", line["tokens_per_s"], line["peak_memory_bytes"])
    failure = failures.first(out / failures.LOGS)
    if failure is None or not failure.stopped_by:
        raise MopError(f"a real step failed for another reason than memory: {done.stderr.strip()[-400:]}")
    return StepOutcome(False, failure.stopped_by, failures.one_line(failure), None, None)


def _agree(found: Reach) -> None:
    for length, outcome, should in (
        (found.longest, found.at_longest, True),
        (found.first_failing, found.at_first_failing, False),
    ):
        if outcome is not None and outcome.ran != should:
            raise MopError(
                f"{found.strategy}: by the dry run {length} tokens {'fit' if should else 'do not fit'}, "
                f"a real step {'ran' if outcome.ran else 'was stopped: ' + outcome.message}"
            )


def write_reaches(
    out: Path, reaches: list[Reach], limits: Limits, command: str, environment: dict[str, str]
) -> dict[str, Any]:
    """reach.json and reach.md in `out`, with the limits, the environment and the command that makes them."""
    payload = {
        "command": command,
        "limits": asdict(limits),
        "environment": environment,
        "reaches": [asdict(r) for r in reaches],
    }
    write_json(str(out / "reach.json"), payload)
    write_text(out / "reach.md", _markdown(reaches, limits, command, environment))
    return payload


_TRAINED = (
    "Lengths are found by dry run; the longest fitting and the first failing one are then run as",
    "real training steps with the limits enforced. tokens/s is of that one step: the first of its run,",
    "every allocation tracked, the machine shared. It orders nothing but itself.",
)
_PLAYED = ("Lengths are found by dry run; no step was trained at them.",)


_COLUMNS = (
    "ranks", "strategy", "CP", "longest (tokens)", "first failing", "device peak at longest", "host peak",
    "tokens/s at longest", "stopped by",
)  # fmt: skip


def _row(r: Reach) -> tuple[object, ...]:
    speed = r.at_longest.tokens_per_second if r.at_longest else None
    return (
        r.world_size, r.strategy, r.sequence_degree, f"{r.longest:,}", f"{r.first_failing:,}",
        format_bytes(r.peak_memory), format_bytes(r.host_memory), f"{speed:,.0f}" if speed else "not run",
        r.stopped_by,
    )  # fmt: skip


def _markdown(reaches: list[Reach], limits: Limits, command: str, environment: dict[str, str]) -> str:
    times = ratios(reaches)
    lines = [
        "# Context reach under enforced limits", "",
        f"Limits per rank: device {format_bytes(limits.device)}, host {format_bytes(limits.host)}.",
        *(_TRAINED if any(r.at_longest for r in reaches) else _PLAYED), "",
        *(f"Network: {model}." for model in dict.fromkeys(r.model for r in reaches)), "",
        f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|",
        *(f"| {' | '.join(map(str, _row(r)))} |" for r in reaches),
        *(["", "Reach over the other strategies on as many ranks:", "", *times] if times else []), "",
        "Environment: " + ", ".join(f"{k} {v}" for k, v in environment.items()), "",
        f"Command: `{command}`", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _times(best: Reach, other: Reach) -> str:
    """'8.6 to 9.4x': between the ends that the quantum leaves, as a reach lies below the first that fails."""
    low, high = best.longest / other.first_failing, best.first_failing / other.longest
    return f"{low:.1f}x" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f}x"


def ratios(reaches: list[Reach]) -> list[str]:
    lines = []
    for ranks in sorted({r.world_size for r in reaches}):
        same = [r for r in reaches if r.world_size == ranks]
        best = max(same, key=lambda r: r.longest)
        lines += [
            f"- {ranks} ranks: {best.strategy} reaches {_times(best, r)} as far as {r.strategy}"
            for r in same if r is not best and r.longest
        ]  # fmt: skip
    return lines
