"""The script of `make gpu` on a machine without one."""

import ctypes
import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from mopexec.distributed.tiers import Platform
from mopsim.common import io
from mopsim.spec.plan import Plan
from tests.exec.forking import Program
from tests.exec.spawn import pool, run_command
from tests.exec.train_runs import environment
from tests.gpu.report import NO_GPU, ROOT, TESTS, contenders, execute_here, full, main, table
from tests.patience import HANG

needs_none = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


@needs_none
def test_without_a_gpu_it_says_so_and_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{NO_GPU}\n"
    assert not list(tmp_path.iterdir())


@needs_none
def test_both_strategies_are_run_and_reported(tmp_path: Path) -> None:
    """Trained by a stand-in that is twice as fast for MoP; the baseline is of the same model and batch."""
    plans: dict[str, Plan] = {}

    def execute(arguments: Sequence[str]) -> int:
        given = dict(zip(arguments[3:-1:2], arguments[4::2], strict=True))
        assert arguments[-1] == "--no-final-checkpoint"
        plan = plans[Path(given["--plan"]).stem] = io.load(Path(given["--plan"]), Plan, "plan")
        out, seconds = Path(given["--out"]), 1.0 if "mop" in given["--out"].rsplit("/", 1)[-1] else 2.0
        out.mkdir()
        line = {"step_time_s": seconds, "tokens_per_s": 64 / seconds, "peak_memory_bytes": 5, "loss": 3.0}
        (out / "metrics.jsonl").write_text(f"{json.dumps(line)}\n" * int(given["--steps"]))
        assert plan.strategy.world_size == 2
        return 0

    assert main([str(tmp_path), "--tiny", "--ranks", "2"], execute) == 0
    assert set(plans) == {"mop", "fsdp2"}
    assert plans["mop"].training == plans["fsdp2"].training
    found = json.loads((tmp_path / "gpu.json").read_text())["runs"]
    assert found["fsdp2"]["step_time_s"] == 2 * found["mop"]["step_time_s"] == 2.0
    assert "0.50 of the baseline's step time" in (tmp_path / "gpu.md").read_text()


def test_what_a_command_has_started_ends_with_it(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = f"import subprocess as s; open({str(pid)!r}, 'w').write(str(s.Popen(['sleep', '9999']).pid))"
    assert execute_here(int(HANG))(["-c", code]) == 0
    started, end = Path(f"/proc/{pid.read_text()}/stat"), time.monotonic() + HANG
    while started.exists() and started.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end
        time.sleep(0.02)
    assert execute_here(1)(["-c", "import time; time.sleep(9999)"]) == 124


@needs_none
def test_ranks_of_tests_end_with_them() -> None:
    """Those too that wait for one another on a card."""
    assert pool(2).run("tests.gpu.test_report", "death_signal") == [signal.SIGKILL] * 2


def death_signal(platform: Platform) -> int:
    """That this process gets when its parent ends."""
    found = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(found))
    return found.value


def test_the_tests_for_gpus_are_named() -> None:
    marked = (path for path in ROOT.glob("tests/exec/test_*.py") if "mark.gpu" in path.read_text())
    assert sorted(str(path.relative_to(ROOT)) for path in marked) == list(TESTS)


def test_a_run_that_fails_is_an_error(tmp_path: Path) -> None:
    assert main([str(tmp_path), "--tiny", "--ranks", "1"], lambda arguments: 1) == 1
    assert table({"mop": {"rc": 1}, "fsdp2": {"rc": 0}}, "a card", "passed").count("|") == 12


@pytest.mark.parametrize("ranks", [1, 8, 16])
def test_plans_of_cards_can_be_run(ranks: int) -> None:
    from mopexec.run.supported import check_supported

    for plan in contenders(full(ranks), ranks, "cuda").values():
        check_supported(plan)
        assert plan.training.tokens_per_rank(plan.strategy) == 32768


@needs_none
@pytest.mark.slow
def test_a_tiny_run_over_gloo(tmp_path: Path) -> None:
    """The first training by the launcher; the ranks of both are forked."""

    def launched(arguments: Sequence[str]) -> int:
        program = Program(arguments[1:], environment(), tmp_path / "launched")
        program.communicate()
        return program.returncode

    def forked(arguments: Sequence[str]) -> int:
        return run_command(list(arguments[2:]), 2, tmp_path)[0]

    runs = iter((launched, forked))
    assert main([str(tmp_path), "--tiny", "--ranks", "2"], lambda arguments: next(runs)(arguments)) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())["runs"]
    assert all(row["tokens_per_s"] > 0 for row in found.values())
