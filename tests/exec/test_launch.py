"""Scripts for a cluster, and SLURM's variables as a rank's place."""

import json
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from mopexec.cli import main
from mopexec.distributed.tiers import Platform
from mopexec.run import environment, job, launch
from mopsim.common import io
from mopsim.common.errors import MopError
from tests.exec.train_plans import small_plan

PINNED = "pinned_max_cached_size_mb:1"
OPTIONS = ["--", "--data", "my data.jsonl", "--steps", "9", "--out", "/runs/a b"]


@pytest.fixture
def plan(tmp_path):
    made = small_plan(4)
    hardware = msgspec.structs.replace(made.hardware, num_nodes=2, devices_per_node=2)
    io.write_yaml(tmp_path / "plan.yaml", msgspec.structs.replace(made, hardware=hardware))
    return tmp_path / "plan.yaml"


def launched(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(["launch", *map(str, arguments)])
    return end.value.code, *capsys.readouterr()


@pytest.mark.parametrize("kind", ["slurm", "torchrun"])
def test_a_script_starts_a_rank_for_each_device(kind, plan, capsys):
    code, text, _ = launched(capsys, "--plan", plan, f"--{kind}", *OPTIONS)
    assert code == 0
    assert "--nnodes=2 --nproc-per-node=2" in text
    assert "--data 'my data.jsonl' --steps 9 --out '/runs/a b'" in text
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600\n" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    if kind == "slurm":
        assert "#SBATCH --nodes=2" in text
        assert "#SBATCH --gpus-per-node=2" in text
        assert "test -e '/runs/a b'/metrics.jsonl && echo --resume" in text


@pytest.mark.parametrize("gpus", [False, True])
def test_ranks_start_with_what_their_devices_need(gpus, monkeypatch):
    """Pinned memory as it was planned and cores near the GPU; one thread and a keeping allocator on a CPU."""
    monkeypatch.setattr(launch.os, "environ", {})
    monkeypatch.setattr(launch, "_on_gpus", lambda: gpus)
    launch._set_environment(2)
    assert ("PYTORCH_ALLOC_CONF" in launch.os.environ) == gpus
    assert ("OMP_NUM_THREADS" in launch.os.environ) != gpus
    monkeypatch.setattr(launch.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert bool(launch._numa()) == gpus
    assert launch.os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "600"


def test_without_numactl_ranks_are_not_bound_which_is_said(monkeypatch, capsys):
    """torch's binding would show a traceback for each rank."""
    monkeypatch.setattr(launch, "_on_gpus", lambda: True)
    monkeypatch.setattr(launch.shutil, "which", lambda name: None)
    assert launch._numa() == {}
    said = capsys.readouterr().err
    assert said == "mopexec: numactl is not installed: ranks are not bound to the cores near their GPU\n"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": PINNED}),
        ({"PYTORCH_ALLOC_CONF": ""}, {"PYTORCH_ALLOC_CONF": PINNED}),
        ({"PYTORCH_ALLOC_CONF": "a:[1:2,3:4]"}, {"PYTORCH_ALLOC_CONF": f"a:[1:2,3:4],{PINNED}"}),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "a:1", "PYTORCH_ALLOC_CONF": "b:2"},
            {"PYTORCH_CUDA_ALLOC_CONF": f"a:1,{PINNED}", "PYTORCH_ALLOC_CONF": "b:2"},
        ),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": PINNED}),
        (
            {"PYTORCH_ALLOC_CONF": "pinned_max_cached_size_mb:64"},
            {"PYTORCH_ALLOC_CONF": "pinned_max_cached_size_mb:64"},
        ),
    ],
)
def test_the_allocators_settings_join_the_users(given, expected, monkeypatch, capsys):
    """In the one variable that torch reads, said in a line; by the script as by the launcher."""
    monkeypatch.setattr(launch.os, "environ", dict(given))
    monkeypatch.setattr(launch, "_on_gpus", lambda: True)
    launch._set_environment(2)
    found = {name: value for name, value in launch.os.environ.items() if "ALLOC" in name}
    assert found == expected
    said = capsys.readouterr().err.splitlines()
    changes = [name for name in given if given[name] and found[name] != given[name]]
    assert said == [f"mopexec: ranks start with {name}={found[name]}" for name in changes]
    ran = in_a_script(given)
    assert ran.returncode == 0, ran.stderr
    assert {line for line in ran.stdout.splitlines() if "ALLOC" in line} == {
        f"{name}={value}" for name, value in expected.items()
    }
    assert ran.stderr.count("\n") == 1


def in_a_script(given, knows=True):
    """The script's lines for the allocator, where torch is new enough or is not, and then `env`."""
    asked = f'python3() {{ {sys.executable} -c {shlex.quote(KNOWS[knows])}"$2"; }}'
    script = f"set -euo pipefail\n{asked}\n{environment.GPU_RANK_SCRIPT}\nenv"
    where = {"PYTHONPATH": str(Path(environment.__file__).parents[2])}
    return subprocess.run(["/bin/bash", "-c", script], env=given | where, capture_output=True, text=True)


KNOWS = {
    known: f"import mopexec.run.environment as e; e.version = lambda name: {release!r}\n"
    for known, release in ((True, "2.13.0+cu130"), (False, "2.12.1"))
}


@pytest.mark.parametrize(
    ("release", "known"),
    [("2.11.0", False), ("2.12.1+cu130", False), ("2.13.0", True), ("2.14.0a0", True), ("3.0.1", True)],
)
def test_a_torch_that_does_not_know_the_setting_is_spared_it(release, known, monkeypatch, capsys):
    """It would end each rank; that more of the host is taken is said."""
    monkeypatch.setattr(environment, "version", lambda name: release)
    monkeypatch.setattr(launch.os, "environ", {})
    monkeypatch.setattr(launch, "_on_gpus", lambda: True)
    launch._set_environment(2)
    assert ("PYTORCH_ALLOC_CONF" in launch.os.environ) == known
    assert capsys.readouterr().err == ("" if known else f"mopexec: {environment.ROUNDED}\n")
    ran = in_a_script({"PYTORCH_ALLOC_CONF": "a:1"}, known)
    assert ran.returncode == 0, ran.stderr
    setting = f"a:1,{PINNED}" if known else "a:1"
    assert f"PYTORCH_ALLOC_CONF={setting}\n" in ran.stdout
    said = [] if known else [environment.ROUNDED]
    assert ran.stderr.splitlines() == [*said, f"PYTORCH_ALLOC_CONF={setting}"]


def test_a_script_is_written_where_torch_is_not_installed(monkeypatch):
    """On a login node; the ranks' own torch is asked where they start."""

    def absent(name):
        raise environment.PackageNotFoundError(name)

    monkeypatch.setattr(environment, "version", absent)
    assert environment.gpu_rank_defaults() == {}


def test_ranks_with_a_gpu_share_the_launchers_cores(monkeypatch):
    """As probe's do, which measures AdamW on the host; torchrun would give each one thread. The device is
    bound, so that NCCL connects at once."""
    begun, device, before = [], torch.device("cuda", 1), torch.get_num_threads()
    monkeypatch.setattr(job.Platform, "detect", lambda: Platform(device))
    monkeypatch.setattr(job.dist, "init_process_group", lambda *_, **given: begun.append(given["device_id"]))
    monkeypatch.setattr(job.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(job, "usable_cores", lambda: list(range(24)))
    meeting = job.RankMeeting(environment.RankPlace(1, 8, 1, 8, 29500), None, again=False)
    try:
        for cores, expected in (("", 3), ("48", 6), ("4", 1)):
            monkeypatch.setenv(environment.CORES, cores)
            with job.join(meeting):
                assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
    assert begun == [device] * 3


def test_options_that_may_be_repeated_may_be(plan, capsys):
    repeated = ["--set", "clip_norm=2", "--set", "beta1=0.8"]
    code, text, _ = launched(capsys, "--plan", plan, "--slurm", *OPTIONS, *repeated)
    assert code == 0
    assert "--set clip_norm=2 --set beta1=0.8" in text


def test_a_script_can_be_written(plan, tmp_path, capsys):
    launched(capsys, "--plan", plan, "--slurm", "--script", tmp_path / "job.sh", *OPTIONS)
    assert (tmp_path / "job.sh").read_text().startswith("#!/bin/bash\n")


def test_a_script_is_said_as_json(plan, tmp_path, capsys):
    script = tmp_path / "job.sh"
    options = ["--slurm", "--script", script, "--json", "-", *OPTIONS]
    code, text, _ = launched(capsys, "--plan", plan, *options)
    found = json.loads(text)
    assert code == 0
    assert (found["kind"], found["nodes"], found["ranks_per_node"]) == ("slurm", 2, 2)
    assert found["text"] == script.read_text()
    assert found["train_options"] == OPTIONS[1:]
    code, _, error = launched(capsys, "--plan", plan, "--slurm", "--json", "-", *OPTIONS)
    assert (code, error) == (2, "mopexec: --json: - is where --script goes too\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "give one of --slurm and --torchrun"),
        (["--slurm", "--torchrun"], "give one of --slurm and --torchrun"),
        (["--slurm"], "--out: is needed"),
        (["--slurm", *OPTIONS, "--stepz", "9"], "--stepz"),
        (["--slurm", *OPTIONS[:3], *OPTIONS[5:]], "'--steps'"),
        (["--slurm", *OPTIONS, "--keep", "0"], "--keep: '0' is refused"),
        (["--slurm", *OPTIONS, "--eval-batches", "2"], "--eval-batches: 2 has no use without --eval-data"),
        (["--slurm", *OPTIONS, "--out", "b"], "--out: is given twice"),
        (["--slurm", *OPTIONS, "--out=b"], "--out: is given twice"),
        (["--slurm", *OPTIONS, "--steps", "8"], "--steps: is given twice"),
        (["--slurm", *OPTIONS, "--plan", "other.yaml"], "--plan: is given before --"),
        (["--slurm", "--", *OPTIONS[3:]], "--data: is needed"),
        (["--slurm", *OPTIONS, "--max-restarts", "2"], "--max-restarts: 2 is torchrun's own option here"),
        (
            ["--slurm", *OPTIONS, "--set", "nonsense=1"],
            "--set: 'nonsense=1': is not FIELD=VALUE of plan",
        ),
        (["--torchrun", *OPTIONS, "--set", "beta1=2"], "plan.training.beta1: 2.0 must lie in [0, 1)"),
        (["--torchrun", *OPTIONS, "--device-limit", "much"], "--device-limit: 'much'"),
        (["--torchrun", *OPTIONS, "--init-from", "tests"], "config.json"),
    ],
)
def test_what_is_missing_is_said(arguments, line, plan, capsys):
    code, _, error = launched(capsys, "--plan", plan, *arguments)
    assert (code, error.count("\n")) == (2, 1)
    assert line in error


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu7", "gpu7"), ("gpu7,gpu9", "gpu7"), ("gpu[003-005,9],x", "gpu003"), ("a-b[12].eu,c", "a-b12.eu"),
        ("r1[8,10]", "r18"), ("localhost", "localhost"),
    ],
)  # fmt: skip
def test_the_first_host_of_slurms_list(hosts, first):
    assert environment.first_host(hosts) == first


def test_tasks_of_srun_are_ranks(monkeypatch):
    task = {
        "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_TASKS_PER_NODE": "4(x2)",
        "SLURM_JOB_NODELIST": "gpu[03-04]", "SLURM_JOB_ID": "12007",
    }  # fmt: skip
    monkeypatch.setattr(environment.os, "environ", own := dict(task))
    environment.adopt_slurm()
    assert {name: value for name, value in own.items() if name not in task} == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu03", "MASTER_PORT": "29507",
    }  # fmt: skip
    assert environment.under_torchrun()
    monkeypatch.setattr(environment.os, "environ", task | {"SLURM_NTASKS": "1"})
    environment.adopt_slurm()
    assert not environment.under_torchrun()


def test_threads_of_a_rank_are_a_number(monkeypatch):
    for text, number in (("4", 4), ("4,2", 4), ("", 1)):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert environment.threads() == number
    for text in ("x", "0", "1e9", "99999999999"):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        with pytest.raises(MopError, match=f"OMP_NUM_THREADS: '{text}' must be an integer from 1 to 32767"):
            environment.threads()


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"RANK": "x"}, "RANK: 'x' must be an integer from 0 to 3"),
        ({"RANK": "5"}, "RANK: '5' must be an integer from 0 to 3"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: '0' must be an integer from 1 to"),
        ({"WORLD_SIZE": "2"}, "plan.strategy.world_size: 4 is not the 2 ranks of this launch"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK: '2' must be an integer from 0 to 1"),
        ({"MASTER_PORT": "bad"}, "MASTER_PORT: 'bad' must be an integer from 1 to 65535"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT: '70000' must be an integer from 1 to 65535"),
    ],
)
def test_a_place_that_is_none_is_one_line(wrong, line, plan, tmp_path, monkeypatch, capsys):
    places = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (places | {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"} | wrong).items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as end:
        main(["train", "--plan", str(plan), "--data", "python", "--steps", "1", "--out", str(out)])
    error = capsys.readouterr().err
    assert (end.value.code, error.count("\n")) == (2, 1)
    assert error.startswith(f"mopexec: {line}")
    assert not out.exists()


def test_a_host_without_an_address_is_one_line(plan, tmp_path, monkeypatch, capsys):
    rank = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "gpu-03", "MASTER_PORT": "29500"}
    asked = []

    def unknown(name, port):
        asked.append(name)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(environment.os, "environ", dict(environment.os.environ) | rank)
    monkeypatch.setattr(environment.socket, "getaddrinfo", unknown)
    monkeypatch.setattr(environment.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(environment, "RESOLVE_SECONDS", 0.1)
    with pytest.raises(SystemExit) as end:
        main(
            ["train", "--plan", str(plan), "--data", "python", "--steps", "1", "--out", str(tmp_path / "run")]
        )
    rule = "'gpu-03' must be a host that has an address: Name or service not known"
    assert (end.value.code, capsys.readouterr().err) == (2, f"mopexec: MASTER_ADDR: {rule}\n")
    assert set(asked) == {"gpu-03"}
    assert len(asked) > 1
    assert not (tmp_path / "run").exists()
