"""Kills at random steps, each followed by a resume: the loss curve is bitwise that of an undisturbed run, or,
where each resume is of another family on another number of ranks, within 1e-6 of it in float64.

`make kills` writes kills.md and kills.json into reports/executor; exits with 1 where a curve differs, a
checkpoint is lost or a process is left 30 seconds after a rank was killed.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mopsim.common import io
from mopsim.common.io import write_text
from mopsim.spec.plan import Plan
from tests.exec.test_other_strategy import fsdp2_plan, in_float64, split_plan
from tests.exec.train_plans import small_plan
from tests.exec.train_runs import (
    ROOT,
    TRAINING,
    common,
    environment,
    ranks_of,
    train_as_ranks,
    write_inputs,
)

STEPS_A_KILL = 4
EVERY = 2
GONE = 30.0
"""Seconds within which every rank must be gone."""
WITHIN = 1e-6
"""Of a loss, relative, in float64 under another strategy: sums have another order."""


@dataclass(frozen=True)
class Kill:
    """under: the strategy; victim: a rank or the launcher; step: steps in metrics.jsonl at the kill; writing:
    whether a checkpoint was being written; gone_s: until no process of the run was left; kept: the newest
    complete checkpoint; off: the largest relative difference of a loss so far; equal: whether it is within
    what is asked.
    """

    under: str
    victim: str
    step: int
    writing: bool
    gone_s: float
    kept: int
    off: float
    equal: bool


Plans = dict[str, tuple[str, Plan]]
"""By name: the family, and the plan."""


def same() -> Plans:
    """One plan of 2 ranks, in float32."""
    return {"MoP on 2": ("mop", small_plan(**TRAINING))}


def elsewhere() -> Plans:
    """Plans of every runtime, in float64, the first that of the undisturbed run."""
    tensors: dict[str, Any] = {"tensor_parallel": 2, "expert_parallel": 2}
    ring: dict[str, Any] = {"context_parallel": 2, "context_exchange": "ring"}
    return {
        "MoP on 2": ("mop", in_float64(small_plan(2, **TRAINING))),
        "FSDP2 on 4, TP, CP and EP": ("fsdp2", fsdp2_plan(4, **tensors, **ring)),
        "split modules on 2, TP and ETP": (
            "split", split_plan(2, tensor_parallel=2, expert_tensor_parallel=2),
        ),
        "MoP on 1": ("mop", in_float64(small_plan(1, **TRAINING))),
        "FSDP2 on 2, offloaded": ("fsdp2", fsdp2_plan(2, expert_parallel=2, offload=True, recompute="full")),
        "split modules on 4, PP and EP": ("split", split_plan(4, pipeline_parallel=2, expert_parallel=2)),
    }  # fmt: skip


def following(plans: Plans, now: str, chosen: random.Random) -> str:
    """A plan of another family on another number of ranks, where there are any."""
    family, plan = plans[now]
    others = [
        name
        for name, (kind, one) in plans.items()
        if kind != family and one.strategy.world_size != plan.strategy.world_size
    ]
    return chosen.choice(others) if others else now


def sweep(folder: Path, kills: int, seed: int, plans: Plans, *, background: bool) -> list[Kill]:
    """Kill a run `kills` times, resume it each time under a plan that follows, and hold all steps against
    those of an undisturbed one.
    """
    inputs, under = write_inputs(folder), next(iter(plans))
    io.write_yaml(inputs / "plan.yaml", plans[under][1])
    steps = STEPS_A_KILL * kills + 4
    shared = ["--steps", str(steps), "--checkpoint-every", str(EVERY), "--profile-steps", "0"]
    shared += ["--checkpoint-async"] if background else []
    plain = folder / "plain"
    train_as_ranks(inputs, plain, *shared)
    wanted = curve(plain)
    assert len(wanted) == steps, "the undisturbed run did not end"
    out, chosen, found = folder / "killed", random.Random(seed), list[Kill]()
    for number in range(kills):
        process = _start(inputs, out, *shared, *(["--resume"] if number else []))
        found.append(_kill(process, out, chosen, under, partial(differs, wanted=wanted), within(plans)))
        under = following(plans, under, chosen)
        io.write_yaml(inputs / "plan.yaml", plans[under][1])
    train_as_ranks(inputs, out, *shared, "--resume")
    whole = curve(out)
    assert len(whole) == steps, "the last resume did not end"
    assert differs(whole, wanted) <= within(plans), "the whole curve differs"
    return found


def within(plans: Plans) -> float:
    """Largest relative difference of a loss that is equal: none under one plan."""
    return WITHIN if len(plans) > 1 else 0.0


def differs(done: list[float], wanted: list[float]) -> float:
    """The largest relative difference of a loss."""
    return max((abs(one - two) / abs(two) for one, two in zip(done, wanted, strict=False)), default=0.0)


def _kill(
    process: subprocess.Popen[str], out: Path, chosen: random.Random, under: str,
    differs: Callable[[list[float]], float], within: float,
) -> Kill:  # fmt: skip
    before = newest(out)
    target = before + chosen.randrange(1, 2 * STEPS_A_KILL - 1)
    while not reached(out, before + 1, target):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    time.sleep(chosen.random() * 0.2)
    ranks = sorted(set(ranks_of(out)) - {process.pid})
    victim = chosen.choice(["launcher", *range(len(ranks))])
    writing = bool(list((out / "checkpoints").glob(".writing_*")))
    step = len(curve(out))
    os.kill(process.pid if victim == "launcher" else ranks[int(victim)], signal.SIGKILL)
    begin = time.monotonic()
    while ranks_of(out) and time.monotonic() < begin + 2 * GONE:
        time.sleep(0.02)
    gone = time.monotonic() - begin
    process.communicate()
    off, name = differs(curve(out)), victim if victim == "launcher" else f"rank {victim}"
    return Kill(under, name, step, writing, round(gone, 2), newest(out), off, off <= within)


def _start(inputs: Path, out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mopexec.cli", "train", *common(inputs, out), *arguments]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, **pipes)  # type: ignore[call-overload]


def reached(out: Path, since: int, step: int) -> bool:
    """Whether the process that began with step `since` has done `step`."""
    last = (_lines(out) or [{"since": 0, "step": 0}])[-1]
    return bool(last["since"] == since and last["step"] >= step)


def curve(out: Path) -> list[float]:
    """Losses by step; the steps must be 1, 2, ... without a gap or a repetition."""
    lines = _lines(out)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def _lines(out: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl; a last one that is half is left out."""
    path = out / "metrics.jsonl"
    text = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in text if line.endswith("}")]


def newest(out: Path) -> int:
    """Steps of the newest complete checkpoint, 0 where there is none."""
    complete = (out / "checkpoints").glob("step_*/run.json")
    return max((int(path.parent.name.removeprefix("step_")) for path in complete), default=0)


def passed(kill: Kill) -> bool:
    return kill.equal and kill.gone_s <= GONE


def report(found: list[Kill], several: bool) -> str:
    """A table, and what it says."""
    good, writing = sum(map(passed, found)), sum(kill.writing for kill in found)
    rows = "".join(
        f"| {number} | {kill.under} | {kill.victim} | {kill.step} | {'yes' if kill.writing else 'no'} "
        f"| {kill.kept} | {kill.gone_s:.2f} | {kill.off:.1g} | {'yes' if kill.equal else 'NO'} |\n"
        for number, kill in enumerate(found, 1)
    )
    most = max(kill.off for kill in found)
    told = (
        f"The same in float64, each resume of another family on another number of ranks. **{good} of "
        f"{len(found)}**: all losses are within {WITHIN:g} of those of a run that nothing disturbed, "
        f"{most:.1g} at most."
        if several
        else f"One run of 2 ranks (flat_units, float32, a checkpoint every {EVERY} steps, written beside the "
        "steps) was ended by `kill -9` of a rank or of the launcher at random moments and resumed each "
        f"time. **{good} of {len(found)}**: every process was gone within {GONE:g} s, and all steps up to "
        "there, as those after the last resume, have bitwise the losses of a run that nothing disturbed."
    )
    return (
        f"{told} {writing} kills came while a checkpoint was being written.\n\n"
        "| kill | of a run under | of | after step | while writing | checkpoint kept | seconds until gone "
        "| off | curve equal |\n|---|---|---|---|---|---|---|---|---|\n" + rows
    )


SWEEPS = {"same": same, "elsewhere": elsewhere}


def main() -> int:
    """`kills.py OUT [KILLS [SEED [SWEEP ..]]]`: the sweeps that are named, others as last reported."""
    out, kills, seed = Path(sys.argv[1]), *(int(v) for v in [*sys.argv[2:4], "20", "1"][:2])
    path = out / "kills.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    for name in sys.argv[4:] or SWEEPS:
        folder = Path(tempfile.mkdtemp(prefix="mop-kills-"))
        try:
            swept = sweep(folder, kills, seed, SWEEPS[name](), background=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        found[name] = {"seed": seed, "kills": [asdict(kill) for kill in swept]}
    out.mkdir(parents=True, exist_ok=True)
    io.write_json(str(path), found)
    done = {name: [Kill(**kill) for kill in one["kills"]] for name, one in found.items()}
    text = "\n".join(f"## {name}\n\n{report(some, name != 'same')}" for name, some in done.items())
    write_text(out / "kills.md", f"# Kills\n\n`make kills`.\n\n{text}")
    print(text)
    return 0 if all(map(passed, [kill for some in done.values() for kill in some])) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
