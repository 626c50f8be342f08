"""How commands of mopexec end: interrupted, killed, or asked for what would never end."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import msgspec
import pytest
from torch._C._distributed_c10d import TCPStore

from mopexec.check.dry_run import dry_run
from mopexec.run import checkpoint, job, lock
from mopexec.run.environment import RankPlace
from mopsim.common.command_line import REPEAT_SECONDS
from mopsim.common.errors import MopError
from mopsim.spec.stacks import load_stack
from mopsim.strategies import fsdp2
from tests.exec.forking import Program, Rank
from tests.exec.spawn import free_port
from tests.exec.train_plans import small_model, small_plan
from tests.exec.train_runs import (
    ROOT,
    common,
    environment,
    fake_as_ranks,
    finish,
    losses,
    ranks_of,
    start_fake,
    steps_done,
    wait_for,
    write_inputs,
)
from tests.patience import HANG


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_verify_leaves_neither_ranks_nor_files(inputs, tmp_path, number):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = ["mopexec.cli", "verify", "--plan", str(inputs / "plan.yaml"), "--steps", "100000"]
    process = Program(command, environment() | {"TMPDIR": str(scratch)}, scratch)
    wait_for(lambda: len(ranks_of(scratch)) == 3, process)
    process.send_signal(number)
    assert finish(process) == (128 + number, "", f"mopexec: stopped by {number.name}")
    assert ranks_of(scratch) == []
    assert not list(scratch.glob("mopexec-*"))


def test_a_rank_that_is_forked_takes_no_signal_as_its_parent_would(monkeypatch):
    """It ended the parent's run a second time, or waited for what only the parent has."""
    fork = os.fork

    def interrupted():
        pid = fork()
        if not pid:
            os.kill(os.getpid(), signal.SIGTERM)
        return pid

    monkeypatch.setattr(os, "fork", interrupted)
    before = signal.signal(signal.SIGTERM, lambda *_: os._exit(3))
    try:
        rank = Rank([sys.executable, "-m", "tests.exec.train_plans"], env=dict(os.environ))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert rank.wait(HANG) == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_rank_that_waits_for_others_can_be_interrupted(inputs, tmp_path, number):
    """Rank 1 never comes; what an earlier run left is there again."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").touch()
    (out / "summary.json").write_text("{}")
    port = free_port()
    places = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    exported = ("--set", "bias_update_rate=0")  # nothing is said of its export
    command = ["mopexec.cli", "train", *common(inputs, out), "--steps", "1", "--resume", *exported]
    process = Program(command, environment() | {name: str(value) for name, value in places.items()}, out)
    wait_for(lambda: job._answers("localhost", port), process)
    process.send_signal(number)
    said = "interrupted" if number == signal.SIGINT else "stopped by SIGTERM"
    assert finish(process) == (128 + number, "", f"mopexec: {said}")
    assert (out / "summary.json").read_text() == "{}"
    assert not (out / lock.NAME).exists()


@pytest.mark.parametrize("entry", ["verify", "train"])
def test_a_rank_that_joins_one_that_has_ended_can_be_interrupted(inputs, tmp_path, entry):
    """It waits where Python runs no handler, and the launcher waited for it for ten minutes."""
    port, out = free_port(), tmp_path / "run"
    options = {"plan": str(inputs / "plan.yaml"), "data": {"source": "python"}, "out": str(out), "steps": 1}
    command = {
        "verify": ["mopexec.check.verify", str(inputs), "1"],
        "train": ["mopexec.run.worker", json.dumps(options)],
    }[entry]
    places = {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    store = TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    process = Program(command, environment() | {name: str(value) for name, value in places.items()}, out)
    first = job._Roster(RankPlace(0, 2, 0, 2, port), store)
    wait_for(first.is_complete, process)
    met = {first.name, "rank0", "rank1", "roster"}
    wait_for(lambda: not met.issuperset(store.list_keys()), process)
    process.send_signal(signal.SIGINT)
    assert finish(process) == (-signal.SIGINT, "", "")


def test_a_rank_whose_others_do_not_come_says_where_it_waited(monkeypatch):
    monkeypatch.setattr(job, "TIMEOUT", timedelta(seconds=0.1))
    port = free_port()
    for rank, rule in ((1, "nothing answers there"), (0, "not all of 2 ranks came there")):
        places = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        for name, value in places.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(
            MopError, match=f"MASTER_ADDR, MASTER_PORT: localhost:{port}: {rule} within 100 ms"
        ):
            job.meet()


def test_ranks_of_an_attempt_meet_among_the_keys_of_those_before():
    """Whatever an attempt that was killed had signed, and whoever comes first."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    places = [RankPlace(rank, 3, rank, 3, 0) for rank in range(3)]

    def arrive(*ranks):
        return [job._Roster(places[rank], store) for rank in ranks]

    def complete(rosters):
        for roster in rosters:
            roster.is_complete()
        return [roster.is_complete() for roster in rosters]

    first = arrive(0, 1, 2)
    complete(first)
    assert complete(first) == [True] * 3
    killed = arrive(2, 0)  # before all have come
    assert complete(killed) == [False] * 2
    last = arrive(1, 0)
    assert complete(last) == [False] * 2
    last += arrive(2)
    complete(last)
    assert complete(last) == [True] * 3
    assert len({roster.name for roster in last}) == 1
    assert last[0].name != first[0].name


def test_a_signal_during_imports_is_neither_lost_nor_fatal():
    """Compiled modules lose an exception that is raised while they import others, or abort on it."""
    code = (
        "import os, signal, sys, threading\n"
        "from mopsim.common.command_line import run_app\n"
        "def app(arguments, standalone_mode):\n"
        "    class Sent:\n"
        "        def find_spec(self, name, path=None, target=None):\n"
        "            try:\n"
        "                os.kill(os.getpid(), signal.SIGTERM)\n"
        "            except BaseException:\n"
        "                print('raised inside an import')\n"
        "            sys.meta_path.remove(self)\n"
        "    sys.meta_path.insert(0, Sent())\n"
        "    import colorsys\n"
        "    threading.Event().wait(30)\n"
        "run_app(app, 'mopexec', ['x'])\n"
    )
    _is_stopped(code)


def _is_stopped(code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANG
    )
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "mopexec: stopped by SIGTERM\n")


def test_a_signal_is_not_lost_where_exceptions_are():
    """What is raised in a hook of fork or in a finalizer is only reported by Python."""
    code = (
        "import os, signal, threading\n"
        "from mopsim.common.command_line import run_app\n"
        "def app(arguments, standalone_mode):\n"
        "    os.register_at_fork(before=lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
        "    if not os.fork():\n"
        "        os._exit(0)\n"
        "    threading.Event().wait(30)\n"
        "run_app(app, 'mopexec', ['x'])\n"
    )
    _is_stopped(code)


def test_a_key_that_is_held_down_is_one_ctrl_c(inputs, tmp_path):
    out = tmp_path / "run"
    process = start_fake(inputs, out, "slow", steps=1000)
    wait_for(lambda: steps_done(out) >= 2, process)
    for _ in range(20):
        process.send_signal(signal.SIGINT)
        time.sleep(0.03)
    code, _, err = finish(process)
    assert (code, len(err.splitlines())) == (130, 1), err
    assert "go on with --resume" in err
    assert checkpoint.newest_state(out)[1].step == steps_done(out)
    assert ranks_of(out) == []


def test_a_second_ctrl_c_ends_a_step_that_does_not(inputs, tmp_path):
    out = tmp_path / "run"
    process = start_fake(inputs, out, "stall:1:4", steps=9, checkpoint_every=2)
    wait_for(lambda: steps_done(out) >= 3, process)
    process.send_signal(signal.SIGINT)
    time.sleep(REPEAT_SECONDS + 0.5)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    last = out / "checkpoints" / "step_00000002"
    rest = f"before a checkpoint was done since the last, {last}; go on with --resume"
    assert (code, err) == (130, f"mopexec: stopped by SIGINT {rest}")
    assert ranks_of(out) == []


@pytest.mark.parametrize("runtime", ["flat_units", "fully_shard"])
def test_a_dry_run_that_would_not_end_is_refused(runtime):
    plan = small_plan(global_batch=2)
    many = small_model(num_attention_heads=2 * 10**6)
    strategy = plan.strategy if runtime == "flat_units" else fsdp2(2, dtype="float32")
    plan = msgspec.structs.replace(plan, model=many, strategy=strategy, stack=load_stack(strategy.stack))
    with pytest.raises(MopError, match=f"1,000,000 query heads of a KV head.* dry run of {runtime}"):
        dry_run(plan)


@pytest.fixture(scope="module")
def plain(inputs, tmp_path_factory):
    """The losses of nine steps that nothing disturbs."""
    out = tmp_path_factory.mktemp("runs") / "plain"
    fake_as_ranks(inputs, out, steps=9)
    return losses(out)


@pytest.mark.slow
@pytest.mark.parametrize("fake", ["kill:1:5", "saving:rank:6", "saving:launcher:6"])
def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(inputs, tmp_path, plain, fake):
    """A rank in a step, a rank or the launcher in a checkpoint: one line, no rank left, no step missing or
    double."""
    out = tmp_path / "run"
    code, _, err = finish(start_fake(inputs, out, fake, steps=9, checkpoint_every=2))
    expected = (-signal.SIGKILL, 0) if "launcher" in fake else (1, 1)
    assert (code, len(err.splitlines())) == expected, err
    if "launcher" in fake:
        wait_for(lambda: ranks_of(out) == [])
    else:
        assert err.startswith(f"mopexec: rank {int(fake.startswith('kill'))} was ended by SIGKILL")
        assert ranks_of(out) == []
    assert checkpoint.newest_state(out)[1].step == 4
    assert len(list((out / "checkpoints").glob(".writing_*"))) == fake.startswith("saving")
    fake_as_ranks(inputs, out, steps=9, resume=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert losses(out) == plain
    assert not list((out / "checkpoints").glob(".*"))
