"""Runs of `mopexec train` in processes of their own, for tests of what they leave and how they end."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from mopsim.common import io
from mopsim.spec.plan import Plan
from tests.exec.forking import Program, mark
from tests.exec.spawn import run_command
from tests.exec.train_plans import small_plan
from tests.patience import HANG

ROOT = Path(__file__).parents[2]
TEXT = "".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs\n" for i in range(2000))

UNTIMED = ("--profile-steps", "0")
"""Of a run whose measurement is not read: a step whose kernels are timed takes several times as long."""


TRAINING = {"warmup_steps": 2, "global_batch": 2}
"""Two microbatches of a step: their gradients are added, and more take longer and do the same again."""


def write_inputs(folder):
    """plan.yaml and text.txt in `folder`, where the cache of the runs goes too; returns it."""
    io.write_yaml(folder / "plan.yaml", small_plan(**TRAINING))
    (folder / "text.txt").write_text(TEXT)
    return folder


def environment(fake=""):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "PYTEST"))}
    return {**kept, "FAKE": fake, "OMP_NUM_THREADS": "1"}


def train(inputs, out, *arguments):
    command = [sys.executable, "-m", "mopexec.cli", "train", *common(inputs, out), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=HANG)


def train_as_ranks(inputs, out, *arguments):
    """The same without the launcher and its start: ranks under torchrun. Those of the plan."""
    world = io.load(inputs / "plan.yaml", Plan, "plan").strategy.world_size
    folder = out.with_name(f"{out.name}-ranks")
    folder.mkdir(exist_ok=True)
    done = run_command(["train", *common(inputs, out), *arguments], world, folder)
    return subprocess.CompletedProcess(arguments, *done)


def common(inputs, out):
    paths = {
        "--plan": inputs / "plan.yaml",
        "--data": inputs / "text.txt",
        "--cache": inputs / "cache",
        "--out": out,
    }
    return [str(item) for pair in paths.items() for item in pair]


def fake_under_torchrun(inputs, out, fake, restarts, **options):
    """The fake runner's command under the user's own torchrun, which starts failed ranks again."""
    return under_torchrun(["tests.exec.train_plans", _options(inputs, out, options)], out, fake, restarts)


def under_torchrun(module, out, fake="", restarts=0):
    """`-m MODULE ...`, a run into `out`, on two ranks under the user's own torchrun."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, f"--max-restarts={restarts}", "-m", *module]
    process = Program(command, environment(fake), out)
    said = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, *said)


def start_fake(inputs, out, fake, **options):
    """The command in a process of its own, with the fake runner."""
    return Program(["tests.exec.train_plans", _options(inputs, out, options)], environment(fake), out)


def fake_as_ranks(inputs, out, **options):
    """The same without the launcher and its start, and nothing that fails; returns what it said."""
    folder = out.with_name(f"{out.name}-ranks")
    folder.mkdir(exist_ok=True)
    code, said, err = run_command([_options(inputs, out, options)], 2, folder, "tests.exec.train_plans")
    assert code == 0, err
    return said


def _options(inputs, out, options):
    given = {
        "plan": str(inputs / "plan.yaml"),
        "data": {"source": str(inputs / "text.txt")},
        "cache": str(inputs / "cache"),
        "out": str(out),
        **options,
    }
    return json.dumps(given)


def finish(process):
    out, err = process.communicate(timeout=HANG)
    return process.returncode, out, err.strip()


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def ranks_of(out):
    """Processes that have the run's directory in their command line, or are forked for it."""
    found, own = [], f"{mark(out)}\n"
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()  # of one that has ended nothing
            if str(out).encode() in command or (command and path.with_name("comm").read_text() == own):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def wait_for(condition, process=None):
    """Wait until it holds; no longer than `process` lives, if it is of that."""
    end = time.monotonic() + HANG
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def steps_done(out):
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0
