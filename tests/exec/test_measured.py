"""What a run says of its steps: those that others disturbed are left out, writers get every number."""

import sys
import types

import msgspec
import pytest
import torch

import mopsim
from mopexec.measure.card import MEMORY
from mopexec.measure.probe import noted
from mopexec.measure.quiet import Watch, loaded, others, quiet
from mopexec.run import writers
from mopexec.run.agreed import fullest
from mopexec.run.metrics import Timed, measurement
from mopexec.run.traces import trace
from mopsim.api.inputs import busy
from mopsim.calibrate.runs import load_measurement
from mopsim.common.errors import MopError
from mopsim.common.io import convert, dump_yaml, parse_yaml, to_plain
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.plan import Measurement
from mopsim.spec.profiles import load_profile
from tests.exec.train_plans import small_plan

ALONE = [Timed(1.0, 0.9), Timed(1.02, 0.92), Timed(0.98, 0.88), Timed(1.01, 0.9)]


def test_a_step_that_lost_its_core_is_disturbed_and_one_with_more_to_do_is_not():
    steps = [*ALONE, Timed(1.6, 0.9), Timed(1.6, 1.5), Timed(1.05, 0.93)]
    assert quiet(*list(zip(*steps, strict=True))[:2]) == [True] * 4 + [False, True, True]
    assert quiet([1.0, 9.0], [None, None]) == [True, True]
    assert quiet([], []) == []


def test_what_others_take_of_the_cores_is_told_above_a_limit(monkeypatch):
    """Core 1 is busy for 30 of 40 ticks, core 0 for 10, core 9 is not asked about."""
    text = (
        "cpu  9 9 9 9 9\ncpu0 {0} 0 0 {1} 0 0 0 0 9 9\ncpu1 {2} 0 0 {3} 5 0 0 0 0 0\ncpu9 7 7 7 7 7\nintr 1\n"
    )
    told = iter([text.format(100, 100, 200, 300), text.format(110, 130, 230, 305 + 5)])
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_, **__: next(told))
    share = others([0, 1], seconds=0)
    assert share == pytest.approx(40 / 80)
    assert loaded(share, 2, "step times are") == (
        "other programs have 1.0 of the 2 cores (quiet: at most 0.2): step times are a busy machine's"
    )
    assert loaded(0.1, 2, "step times are") == ""


def test_a_profile_keeps_that_its_machine_was_busy():
    """Also through its file's wrapped lines, a calibration and a search."""
    quiet_one = load_profile("cpu-2core")
    assert noted(quiet_one, 0.1, 2) == quiet_one
    assert busy(quiet_one) == []
    profile = noted(quiet_one, 0.5, 2)
    (said,) = busy(convert(parse_yaml(dump_yaml(to_plain(profile)), "x"), HardwareProfile, "x"))
    assert said.endswith("a busy machine's. While it was probed other programs had 1.0 of the 2 cores")
    job = {"seq_len": 512, "global_batch": 4, "strategy": mopsim.mop(expert_parallel=2)}
    assert mopsim.simulate("tiny", profile, **job).notes == [said]


def test_what_others_take_while_a_rank_works_is_without_its_own(monkeypatch):
    """80 ticks of a core pass, 60 of them busy, of which the rank has 0.2 s."""
    text = "cpu3 {0} 0 0 {1} 0 0 0 0 0 0\n"
    told = iter([text.format(*pair) for pair in ((5, 5), (100, 100), (140, 110), (160, 120))])
    used = iter([9.0, 0.0, 0.1, 0.2])
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_, **__: next(told))
    monkeypatch.setattr("time.process_time", lambda: next(used))
    monkeypatch.setattr("os.sysconf", {"SC_CLK_TCK": 100}.__getitem__)
    watch = Watch([3])
    watch.begin()
    assert watch.share() == pytest.approx((40 - 10) / 50)
    assert watch.share() == pytest.approx((60 - 20) / 80)
    monkeypatch.undo()
    assert Watch([]).share() == 0.0


def test_a_machine_that_does_not_tell_has_no_others(monkeypatch):
    def refuse(*_, **__):
        raise OSError

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    assert others([0], seconds=0) == 0.0


def test_a_measurement_says_how_many_steps_it_leaves_out():
    steps = [[Timed(5.0, 5.0), *ALONE, Timed(3.0, 0.9)], [Timed(7.0, 0.5), *ALONE, Timed(2.0, 1.0)]]
    found = measurement(
        small_plan(), step_times=steps, warmup=1, tokens_per_step=256, kinds={},
        memory={"peak_memory": 1, "memory_by_category": {}, "host_memory": 0}, first_loss=2.0, last_loss=1.0,
        device=torch.device("cpu"), routing="balanced",
    )  # fmt: skip
    assert (found.steps, found.warmup, found.disturbed, found.resumed) == (12, 2, 2, 1)
    assert found.step_times == tuple(wall for wall, *_ in 2 * ALONE)
    assert found.step_time_median == pytest.approx(1.005)


def test_steps_that_ran_uncompiled_are_in_no_measurement(tmp_path):
    """And where all did, there is no time to calibrate with, which is said."""
    plan = small_plan()
    plan = msgspec.structs.replace(plan, strategy=msgspec.structs.replace(plan.strategy, compile="block"))
    watched, later = [Timed(9.0, 8.0, True)] * 3, [Timed(1.0, 0.9)]
    for steps, times in (([watched], ()), ([watched, watched], ()), ([watched + later, watched], (1.0,))):
        found = measurement(
            plan, step_times=steps, warmup=3, tokens_per_step=256, kinds={},
            memory={"peak_memory": 1, "memory_by_category": {}, "host_memory": 0}, first_loss=2.0,
            last_loss=1.0, device=torch.device("cpu"), routing="balanced",
        )  # fmt: skip
        assert (found.step_times, found.step_time_median) == (times, sum(times))
        assert convert(to_plain(found), Measurement, "measurement") == found
        if not times:
            (tmp_path / "measurement.yaml").write_text(dump_yaml(to_plain(found)))
            with pytest.raises(MopError, match="has no time of a step: none ran compiled"):
                load_measurement(tmp_path)


def test_a_measurement_has_what_cards_said_and_nothing_of_a_cpu():
    """The most of any step, as metrics.jsonl names it; NVML may tell less than the allocator."""
    plain = {"peak_memory": 1, "memory_by_category": {}, "host_memory": 0}
    first = fullest({}, {"device": 5.0, "allocated_bytes": 6.0, "reserved_bytes": 9.0, "power_w": 350.0})
    cards = fullest(first, {"device": 5.0, "allocated_bytes": 7.0, "reserved_bytes": 8.0})
    assert cards == {"allocated_bytes": 7, "reserved_bytes": 9}
    for memory, expected in ((plain, {}), (plain | cards, cards)):
        found = measurement(
            small_plan(), step_times=[ALONE], warmup=1, tokens_per_step=256, kinds={}, memory=memory,
            first_loss=2.0, last_loss=1.0, device=torch.device("cpu"), routing="balanced",
        )  # fmt: skip
        written = to_plain(found)
        assert {name: written[name] for name in MEMORY if name in written} == expected
        assert convert(written, Measurement, "measurement") == found


def test_writers_that_are_not_there_are_refused(monkeypatch):
    with pytest.raises(MopError, match="--log-to: 'mlflow' is not one of tensorboard, wandb"):
        writers.check(["mlflow"])
    with pytest.raises(MopError, match="--log-to: 'wandb' is given twice"):
        writers.check(["wandb", "wandb"])
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MopError, match="--log-to: wandb is not installed: pip install wandb"):
        writers.check(["wandb"])


def test_writers_get_the_numbers_of_each_step(tmp_path, monkeypatch):
    seen = []
    run = types.SimpleNamespace(log=lambda numbers, step: seen.append((step, numbers)), finish=lambda: None)
    begun = types.SimpleNamespace(init=lambda **given: seen.append(given) or run)
    board = types.SimpleNamespace(
        add_scalar=lambda name, value, step: seen.append((step, {name: value})), close=lambda: None
    )
    monkeypatch.setitem(sys.modules, "wandb", begun)
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=lambda path: board)
    )
    opened = writers.open_writers(["wandb", "tensorboard"], tmp_path / "run", {"clip_norm": 1.0})
    for writer in opened:
        writer.write(3, {"loss": 0.5})
        writer.close()
    assert seen[0] == {"dir": str(tmp_path / "run"), "name": "run", "config": {"clip_norm": 1.0}}
    assert seen[1:] == [(3, {"loss": 0.5})] * 2


def test_a_trace_has_the_ops(tmp_path):
    trace(tmp_path, 1, torch.device("cpu"), lambda: torch.ones(8, 8) @ torch.ones(8, 8))
    assert "aten::mm" in (tmp_path / "trace" / "rank1.json").read_text()
