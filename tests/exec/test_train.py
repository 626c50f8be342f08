"""Training on two ranks: real steps, resuming, and every way to end."""

import contextlib
import fcntl
import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from mopexec import data
from mopexec.cli import main
from mopexec.run import failures, lock
from mopexec.run.lock import run_lock
from mopexec.run.metrics import MetricsFile
from mopexec.run.schedule import learning_rate
from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.spec.plan import Measurement, Plan
from tests.exec.train_plans import small_plan
from tests.exec.train_runs import (
    TEXT,
    TRAINING,
    UNTIMED,
    common,
    fake_as_ranks,
    fake_under_torchrun,
    finish,
    losses,
    ranks_of,
    start_fake,
    steps_done,
    train,
    train_as_ranks,
    under_torchrun,
    wait_for,
    write_inputs,
)

METRICS = {"step", "loss", "grad_norm", "lr", "step_time_s", "tokens_per_s", "peak_memory_bytes"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """plan.yaml, text.txt and a cache that the module's runs share."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """Six real steps with a checkpoint at the third."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, train(inputs, out, "--steps", "6", "--checkpoint-every", "3", "--json", "-")


def test_a_run_leaves_what_others_rely_on(inputs, whole):
    out, done = whole
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert set(lines[0]) >= METRICS
    assert [line["lr"] for line in lines[:3]] == pytest.approx([1.5e-3, 3e-3, 3e-3])
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["predicted_step_time_s"] == 0.1
    loads, model = lines[0]["expert_loads"], io.load(out / "plan.yaml", Plan, "plan").model
    assert (len(loads), sum(loads)) == (8, model.num_moe_layers * model.num_local_experts)
    assert io.load(out / "plan.yaml", Plan, "plan") == io.load(inputs / "plan.yaml", Plan, "plan")
    measured = io.load(out / "measurement.yaml", Measurement, "measurement")
    assert (measured.world_size, measured.steps, measured.warmup) == (2, 6, 3)
    assert len(measured.step_times) + measured.disturbed == 3
    assert measured.peak_memory == sum(measured.memory_by_category.values()) == lines[-1]["peak_memory_bytes"]
    assert measured.kinds["matmul"].flops > 0
    assert {"all_gather", "all_to_all", "attention"} <= set(measured.kinds)
    assert json.loads(done.stdout)["steps_done"] == 6, "standard output is JSON and nothing else"
    assert tuple(measured.expert_loads) == tuple(lines[-1]["expert_loads"])
    assert "step:    1" in done.stderr
    assert "step:    6" in done.stderr


def test_a_resumed_run_has_the_same_losses_to_the_bit(inputs, whole, tmp_path):
    out = tmp_path / "resumed"
    shutil.copytree(whole[0], out)
    shutil.rmtree(out / "checkpoints" / "step_00000006")
    first, *rest = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    fuller = {**json.loads(first), "peak_memory_bytes": 2**40, "host_memory_bytes": 2**41}
    (out / "metrics.jsonl").write_text("".join([json.dumps(fuller) + "\n", *rest]))
    done = train_as_ranks(inputs, out, "--steps", "6", "--resume")
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["peak_memory_bytes"], summary["host_memory_bytes"]) == (2**40, 2**41), "of all launches"
    assert "step:    4" in done.stdout
    assert "step:    3" not in done.stdout
    assert losses(out) == losses(whole[0])
    assert (out / "checkpoints" / "step_00000006").is_dir()
    measured = io.load(out / "measurement.yaml", Measurement, "measurement")
    assert (measured.steps, measured.warmup, measured.resumed) == (6, 5, 1), "three of each process at most"
    said = " ".join(done.stdout.split())
    assert re.search(r"a step over all launches of the run \([0-9.]+ \S+ from step 4 on\)", said)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [1, 1, 1]), ("linear", [1, 0.55, 0.1]), ("cosine", [1, 0.55, 0.1]), ("wsd", [1, 1, 0.1]),
    ],
)  # fmt: skip
def test_learning_rates_after_warm_up(schedule, rates):
    plan = small_plan(learning_rate=1.0, warmup_steps=4)
    assert learning_rate(plan, 1, 104, schedule) == 0.5
    assert [learning_rate(plan, step, 104, schedule) for step in (4, 54, 104)] == pytest.approx(rates)


def test_a_damaged_newest_checkpoint_is_passed_over(inputs, whole, tmp_path):
    out = tmp_path / "resumed"
    shutil.copytree(whole[0], out)
    for part in (out / "checkpoints" / "step_00000006").glob("*.distcp"):
        part.write_bytes(b"")
    done = train_as_ranks(inputs, out, "--steps", "7", "--resume", *UNTIMED)
    assert done.returncode == 0, done.stderr
    assert ".distcp is not as it was written (its SHA-256 differs)" in done.stdout
    assert "going on from the one before" in done.stdout
    assert losses(out)[:6] == losses(whole[0])
    for part in out.glob("checkpoints/*/*.distcp"):
        part.write_bytes(b"")
    before = {
        name: (out / name).read_text() for name in ("summary.json", "measurement.yaml", "metrics.jsonl")
    }
    done = train_as_ranks(inputs, out, "--steps", "9", "--resume", *UNTIMED)
    assert done.returncode == 2, done.stderr
    assert "none of the 2 checkpoints can be read" in done.stderr
    assert {name: (out / name).read_text() for name in before} == before


def test_what_is_no_run_is_neither_overwritten_nor_resumed(inputs, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    for arguments, line in (([], "is not empty; give another directory"), (["--resume"], "holds no run")):
        with pytest.raises(SystemExit):
            main(["train", *common(inputs, out), "--steps", "2", *arguments])
        assert line in capsys.readouterr().err


def test_a_run_is_alone_in_its_directory_and_killed_before_a_checkpoint_begins_again(
    inputs, whole, tmp_path, capsys, monkeypatch
):
    """No second run beside it; no rank outlives its launcher; with --resume it begins with the first step."""
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    out = tmp_path / "run"
    process = start_fake(inputs, out, "slow", steps=1000)
    wait_for(lambda: steps_done(out) >= 1, process)
    with pytest.raises(SystemExit) as end:
        main(["train", *common(inputs, out), "--steps", "1000", "--resume"])
    line = capsys.readouterr().err
    assert (end.value.code, line.count("\n")) == (2, 1)
    assert "in use by another run" in line
    assert len(ranks_of(out)) == 3
    process.kill()
    finish(process)
    wait_for(lambda: ranks_of(out) == [])
    done = train_as_ranks(inputs, out, "--steps", "6", "--resume", *UNTIMED)
    assert done.returncode == 0, done.stderr
    assert "no checkpoint yet: it begins again with the first step" in done.stdout
    assert losses(out) == losses(whole[0])


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--steps", "7"], "--out: {out} is not empty; give --resume to go on with it"),
        (["--steps", "6", "--resume"], "--steps: 6 is not more than the 6 that checkpoint"),
    ],
)
def test_a_run_that_ended_while_another_read_its_text_stays(
    inputs, whole, tmp_path, capsys, monkeypatch, arguments, rule
):
    out, prepare_all = tmp_path / "run", data.prepare_all
    if "--resume" in arguments:
        out.mkdir()
        (out / "metrics.jsonl").touch()

    def beside(*given):
        shutil.copytree(whole[0], out, dirs_exist_ok=True)
        return prepare_all(*given)

    monkeypatch.setattr(data, "prepare_all", beside)
    with pytest.raises(SystemExit) as end:
        main(["train", *common(inputs, out), *arguments])
    line = capsys.readouterr().err
    assert (end.value.code, line.count("\n")) == (2, 1)
    assert rule.format(out=out) in line
    assert {path.name: path.stat().st_size for path in whole[0].rglob("*") if path.is_file()} == {
        path.name: path.stat().st_size for path in out.rglob("*") if path.is_file()
    }


def test_a_directory_is_taken_once_another_run_has_let_go(tmp_path, monkeypatch):
    """The other run ends while this one waits, and unlinks the file after this one opened it."""
    held, flock = contextlib.ExitStack(), fcntl.flock
    held.enter_context(run_lock(tmp_path))
    asked = []

    def late(file, how):
        asked.append(file)
        if len(asked) == 2:
            held.close()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with run_lock(tmp_path):
        assert len(asked) == 3
        assert (tmp_path / lock.NAME).exists()
        monkeypatch.setattr(lock, "PATIENCE", 0.0)
        with pytest.raises(MopError, match="in use by another run"), run_lock(tmp_path):
            pass


def test_resuming_refuses_what_is_not_the_same_run(inputs, whole, tmp_path, capsys):
    def refused(folder, *arguments):
        with pytest.raises(SystemExit) as end:
            main(["train", *common(folder, whole[0]), *arguments])
        line = capsys.readouterr().err
        assert (end.value.code, line.count("\n")) == (2, 1)
        return line

    before = sorted(whole[0].rglob("*"))
    other = tmp_path / "inputs"
    shutil.copytree(inputs, other)
    io.write_yaml(other / "plan.yaml", small_plan(**TRAINING, seq_len=32))
    assert "is not empty" in refused(inputs, "--steps", "6")
    line = refused(other, "--steps", "9", "--resume")
    assert "plan.training.seq_len: 32 is not the 64 that checkpoint" in line
    assert "seed: 5 is not the 0" in refused(inputs, "--steps", "9", "--resume", "--seed", "5")
    assert "--steps: 6 is not more than the 6 that checkpoint" in refused(inputs, "--steps", "6", "--resume")
    assert sorted(whole[0].rglob("*")) == before


def test_a_run_that_goes_on_by_other_rules_says_so(inputs, tmp_path):
    out = tmp_path / "run"
    fake_as_ranks(inputs, out, steps=1)
    assert "warning" not in fake_as_ranks(inputs, out, steps=2, resume=True)
    said = fake_as_ranks(
        inputs, out, steps=3, resume=True, settings=["learning_rate=0.001"], schedule="linear"
    )
    changes = "learning_rate 0.001 (was 0.003), --schedule 'linear' (was 'constant')"
    assert f"warning: the steps from here on are made with {changes}\n" in said
    rules = {"settings": ["learning_rate=0.001"], "schedule": "linear", "resume": True}
    said = fake_as_ranks(inputs, out, steps=5, **rules)
    assert "warning: the steps from here on are made with --steps 5 (was 3)\n" in said


def test_an_enforced_limit_stops_the_run_in_one_line_that_names_the_category(inputs, tmp_path):
    done = train_as_ranks(inputs, tmp_path / "run", "--steps", "2", "--device-limit", "64KiB")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "device memory: " in done.stderr
    assert "over the limit of 64.00 KiB" in done.stderr
    stopped = failures.first(tmp_path / "run" / failures.LOGS)
    assert stopped is not None
    assert stopped.stopped_by.startswith("device ")


def test_it_is_one_rank_under_the_users_own_torchrun(inputs, whole, tmp_path):
    out = tmp_path / "run"
    done = under_torchrun(["mopexec.cli", "train", *common(inputs, out), "--steps", "2", *UNTIMED], out)
    assert done.returncode == 0, done.stderr
    assert losses(out) == losses(whole[0])[:2]


def test_ctrl_c_ends_after_the_step_with_a_checkpoint_and_no_orphans(inputs, tmp_path):
    out = tmp_path / "run"
    process = start_fake(inputs, out, "slow", steps=1000)
    wait_for(lambda: steps_done(out) >= 2, process)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert err.count("\n") == 0
    done = steps_done(out)
    checkpoint = out / "checkpoints" / f"step_{done:08d}"
    assert (
        err == f"mopexec: stopped by SIGINT after step {done}; checkpoint {checkpoint}; go on with --resume"
    )
    assert checkpoint.is_dir()
    assert ranks_of(out) == []


def test_an_error_on_a_rank_is_one_line_and_a_traceback_in_logs(inputs, tmp_path):
    out = tmp_path / "run"
    code, _, err = finish(start_fake(inputs, out, "raise:1:2", steps=5))
    trace = out / "logs" / "rank1.traceback.txt"
    assert code == 1
    assert err == f"mopexec: rank 1 failed: ValueError: the weights went missing (traceback: {trace})"
    assert "_misbehave" in trace.read_text()


def test_a_failure_at_work_is_no_mistake_of_the_input(inputs, tmp_path):
    code, _, err = finish(start_fake(inputs, tmp_path / "run", "diverge:1:2", steps=5))
    line = r"mopexec: rank \d failed: step 2: loss nan, gradient norm nan: the run diverged at learning rate "
    assert code == 1
    assert re.fullmatch(line + ".*", err)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(inputs, tmp_path):
    out = tmp_path / "run"
    code, _, err = finish(start_fake(inputs, out, "interrupt:1:3", steps=9))
    assert (code, steps_done(out)) == (130, 3)
    assert "stopped by SIGINT after step 3" in err


def test_a_restarted_run_goes_on_from_its_checkpoint(inputs, tmp_path):
    out = tmp_path / "run"
    process = start_fake(inputs, out, "once:1:4", steps=6, checkpoint_every=2, restarts=1)
    code, _, err = finish(process)
    assert code == 0, err
    plain = tmp_path / "plain"
    fake_as_ranks(inputs, plain, steps=6)
    assert losses(out) == losses(plain)


def test_ranks_that_torchrun_starts_again_go_on_from_their_checkpoint(inputs, tmp_path):
    out, plain = tmp_path / "run", tmp_path / "plain"
    done = fake_under_torchrun(inputs, out, "once:1:4", 1, steps=6, checkpoint_every=2)
    assert done.returncode == 0, done.stderr
    assert "going on after step 2" in done.stdout
    fake_as_ranks(inputs, plain, steps=6)
    assert losses(out) == losses(plain)


def test_a_mistake_is_said_once_and_no_restart_goes_on_with_another_launchs_run(inputs, tmp_path):
    out = tmp_path / "run"
    fake_as_ranks(inputs, out, steps=2)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    done = fake_under_torchrun(inputs, out, "", 2, steps=4)
    assert done.returncode == 1
    assert done.stderr.count(f"--out: {out} is not empty; give --resume") == 1, done.stderr
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_run_on_a_gpu_trains_resumes_and_measures(tmp_path):
    io.write_yaml(tmp_path / "plan.yaml", small_plan(world_size=1))
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "run"
    done = train(tmp_path, out, "--steps", "4", "--checkpoint-every", "2")
    assert done.returncode == 0, done.stderr
    first = losses(out)
    shutil.rmtree(out / "checkpoints" / "step_00000004")
    done = train(tmp_path, out, "--steps", "4", "--resume")
    assert done.returncode == 0, done.stderr
    assert losses(out) == pytest.approx(first, rel=1e-5)  # atomic adds leave the last bits open
    measured = io.load(out / "measurement.yaml", Measurement, "measurement")
    assert measured.kinds["matmul"].seconds > 0
    assert measured.environment["cuda"]


@pytest.mark.parametrize(
    "damage", [b"\xff\n", b'{"step": "x"}\n', b'{"step": 2}\n', b'{"step": 2, "loss": NaN}\n']
)
def test_metrics_go_on_from_the_last_whole_line(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.5}\n' + damage)
    found = MetricsFile(path, 2)
    found.close()
    assert found.first_loss == 2.5
    assert path.read_text() == '{"step": 1, "loss": 2.5}\n'
