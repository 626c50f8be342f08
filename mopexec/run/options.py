"""What `mopexec train` was asked for: made once by the command, handed to every rank as JSON."""

from typing import Literal

from mopexec.data import DataOptions
from mopsim.common.errors import require, require_at_least
from mopsim.common.io import Spec

Schedule = Literal["constant", "linear", "cosine", "wsd"]
"""Learning rate after warm-up; all but constant end at a tenth, "wsd" falls in the last fifth only."""


class TrainOptions(Spec, frozen=True, kw_only=True):
    """One training run.

    plan, out, cache: paths as given. settings: FIELD=VALUE of the plan's training, instead of what it says.
    data: what is trained on. tokens: the prepared tokens' directory,
    made by the command that launches the ranks ("" = each node's first rank prepares them). device_limit,
    host_limit: bytes of one rank that the tracker enforces (None = it only watches). tracked_steps: first
    steps that it watches (0 = all where there is a limit, else 2). warmup: first steps left out of the
    measurement. checkpoint_every: steps (0 = only at the end). checkpoint_async: they are
    written beside the next steps, from a copy on the host. keep: complete checkpoints kept.
    eval_data, eval_tokens: held-out data and its prepared tokens; eval_every: steps between evaluations
    (0 = only at the end), each of at most eval_batches global batches. profile_steps: extra steps at the
    end that are timed by kind of work; their updates are thrown away. trace_steps: extra ones of which a
    trace is written. log_to: `mopexec.run.writers`. seed None: the plan's. others: part of the cores that
    other programs had when the command began.
    """

    plan: str
    settings: tuple[str, ...] = ()
    out: str
    steps: int
    data: DataOptions = DataOptions()
    cache: str | None = None
    tokens: str = ""
    init_from: str = ""
    resume: bool = False
    device_limit: int | None = None
    host_limit: int | None = None
    tracked_steps: int = 0
    routing: Literal["learned", "profile"] = "learned"
    eval_data: DataOptions | None = None
    eval_tokens: str = ""
    eval_every: int = 0
    eval_batches: int = 8
    schedule: Schedule = "constant"
    warmup: int = 3
    checkpoint_every: int = 0
    checkpoint_async: bool = False
    final_checkpoint: bool = True
    keep: int = 2
    profile_steps: int = 1
    trace_steps: int = 0
    log_to: tuple[str, ...] = ()
    seed: int | None = None
    others: float = 0.0
    build: str = "mopexec.run.apply:build"
    console: Literal["stdout", "stderr"] = "stdout"

    def __post_init__(self) -> None:
        require_at_least(self, 1, "steps", "eval_batches", "keep")
        counts = ("eval_every", "tracked_steps", "warmup", "checkpoint_every", "profile_steps", "trace_steps")
        require_at_least(self, 0, *counts)
        for field in ("device_limit", "host_limit", "seed"):
            value = getattr(self, field)
            require(value is None or value >= 0, field, value, "must not be negative")
