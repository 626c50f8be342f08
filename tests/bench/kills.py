"""Kills at random steps, each followed by a resume: the loss curve is bitwise that of an undisturbed run.

`make kills` writes reports/executor/kills.md and kills.json; exits with 1 where a curve differs, a checkpoint
is lost or a process is left 30 seconds after a rank was killed.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mopsim.common import io
from mopsim.common.io import write_text
from tests.exec.train_runs import ROOT, common, environment, ranks_of, train_as_ranks, write_inputs

STEPS_A_KILL = 4
EVERY = 2
GONE = 30.0
"""Seconds within which every rank must be gone."""


@dataclass(frozen=True)
class Kill:
    """victim: a rank or the launcher; step: steps in metrics.jsonl at the kill; writing: whether a checkpoint
    was being written; gone_s: until no process of the run was left; kept: the newest complete checkpoint.
    """

    victim: str
    step: int
    writing: bool
    gone_s: float
    kept: int
    equal: bool


def sweep(folder: Path, kills: int, seed: int, *, background: bool) -> list[Kill]:
    """Kill a run `kills` times, resume it each time, and hold all steps against those of an undisturbed
    one.
    """
    inputs = write_inputs(folder)
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
        found.append(_kill(process, out, chosen, wanted))
    train_as_ranks(inputs, out, *shared, "--resume")
    assert curve(out) == wanted, "the whole curve differs"
    return found


def _kill(process: subprocess.Popen[str], out: Path, chosen: random.Random, wanted: list[float]) -> Kill:
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
    done = curve(out)
    name = victim if victim == "launcher" else f"rank {victim}"
    return Kill(name, step, writing, round(gone, 2), newest(out), done == wanted[: len(done)])


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


def report(found: list[Kill]) -> str:
    good, writing = sum(map(passed, found)), sum(kill.writing for kill in found)
    rows = "".join(
        f"| {number} | {kill.victim} | {kill.step} | {'yes' if kill.writing else 'no'} | {kill.kept} "
        f"| {kill.gone_s:.2f} | {'yes' if kill.equal else 'NO'} |\n"
        for number, kill in enumerate(found, 1)
    )
    return (
        "# Kills\n\n"
        f"`make kills`: one run of 2 ranks (flat_units, float32, a checkpoint every {EVERY} steps, written "
        "beside the steps) was ended by `kill -9` of a rank or of the launcher at random moments and resumed "
        f"each time. **{good} of {len(found)}**: every process was gone within {GONE:g} s, and all steps up "
        "to there, as those after the last resume, have bitwise the losses of a run that nothing disturbed. "
        f"{writing} kills came while a checkpoint was being written.\n\n"
        "| kill | of | after step | while writing | checkpoint kept | seconds until gone | curve equal |\n"
        "|---|---|---|---|---|---|---|\n" + rows
    )


def main() -> int:
    """`kills.py OUT [KILLS [SEED]]`"""
    out, kills, seed = Path(sys.argv[1]), *(int(v) for v in [*sys.argv[2:], "20", "1"][:2])
    folder = Path(tempfile.mkdtemp(prefix="mop-kills-"))
    try:
        found = sweep(folder, kills, seed, background=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "kills.md", report(found))
    io.write_json(str(out / "kills.json"), {"seed": seed, "kills": [asdict(kill) for kill in found]})
    print(report(found))
    return 0 if all(map(passed, found)) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
