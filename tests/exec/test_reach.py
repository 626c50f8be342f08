"""How far a context reaches, by dry run; a plan that fits nowhere is a row like another."""

import json
from dataclasses import replace

import pytest

from mopexec.check import dry_run
from mopexec.check.reach import Limits, Reach, ratios, reach
from mopexec.cli import main
from mopexec.measure.scope import NOW
from mopexec.measure.tracker import OutOfMemory
from mopsim.common import io
from mopsim.common.errors import SpecError
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2
from tests.exec.train_plans import small_model, small_plan
from tests.plans import plan_of


def test_a_plan_that_fits_nowhere_does_not_end_the_others(tmp_path):
    """The exit code is 3 where none fits."""
    io.write_yaml(tmp_path / "plan.yaml", small_plan())
    rows, codes = {}, []
    for limit in ("700KiB", "8KiB"):
        out = tmp_path / limit
        limits = ["--device-limit", limit, "--host-limit", "1MB", "--quantum", "64", "--no-confirm"]
        with pytest.raises(SystemExit) as ended:
            main(["reach", "--plan", str(tmp_path / "plan.yaml"), *limits, "--out", str(out)])
        codes.append(ended.value.code)
        (rows[limit],) = json.loads((out / "reach.json").read_text())["reaches"]
    assert codes == [0, 3]
    assert rows["700KiB"]["longest"] >= 64
    assert rows["700KiB"]["peak_memory"] <= 700 * 1024
    assert (rows["8KiB"]["longest"], rows["8KiB"]["first_failing"]) == (0, 64)
    assert rows["8KiB"]["stopped_by"].startswith("device params")


def test_a_ratio_of_reaches_is_as_wide_as_the_quantum_leaves_it():
    one = Reach("a", "m", 2, 1, 22016, 22528, 1, 1, "device", None, None)
    short = replace(one, strategy="b", longest=512, first_failing=1024)
    (said,) = ratios([one, short])
    assert said == "- 2 ranks: a reaches 21.5 to 44.0x as far as b"
    exact = replace(short, longest=22015, first_failing=22016)
    assert ratios([one, exact])[0].endswith("reaches 1.0x as far as b")


def test_lengths_are_played_where_memory_says_that_it_ends(monkeypatch):
    played = []

    def even(plan, *_):
        length = plan.training.seq_len
        played.append(length)
        if length > 10_000:
            raise OutOfMemory("device", 1, 1, 1, "activations")
        return type("Dry", (), {"peak_memory": 50 + length, "host_memory": 2})

    monkeypatch.setattr(dry_run, "dry_run", even)
    found = reach(small_plan(), Limits(10_050, 10**9), 64, None)
    assert (found.longest, found.first_failing) == (9984, 10048)
    assert len(played) < 9


def test_a_length_that_the_plan_refuses_ends_its_reach(monkeypatch):
    def most_256(plan, *_):
        if plan.training.seq_len > 256:
            raise SpecError("strategy.vocabulary.chunk_tokens", 1, "cuts them into too many chunks")
        return type("Dry", (), {"peak_memory": 1, "host_memory": 2})

    monkeypatch.setattr(dry_run, "dry_run", most_256)
    found = reach(small_plan(), Limits(10**9, 10**9), 64, lambda *_: None)
    assert (found.longest, found.first_failing, found.at_first_failing) == (256, 320, None)
    assert found.stopped_by.startswith("the plan: strategy.vocabulary.chunk_tokens: 1 cuts")


def test_a_dry_run_that_ends_early_leaves_no_names_to_the_next():
    model = small_model(vocab_size=8192)
    plan = plan_of(model, fsdp2(2), TrainSpec(seq_len=128, global_batch=2), "cpu")
    fitting = dry_run.dry_run(plan)
    with pytest.raises(OutOfMemory, match="logits wants"):
        dry_run.dry_run(plan, device_limit=fitting.peak_memory - 1)
    assert (NOW.category, NOW.component, NOW.phase) == ("activations", "other", "forward")
