"""Evaluation on held-out data, and batches of which nothing counts: training goes on as if neither had been
asked."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from mopexec import data
from mopexec.run import checkpoint
from mopexec.run.evaluation import Evaluation, open_held_out
from mopexec.run.options import TrainOptions
from mopsim.common import io
from mopsim.common.errors import MopError
from tests.exec.spawn import run_command
from tests.exec.test_other_strategy import fsdp2_plan, in_float64, split_plan
from tests.exec.train_plans import small_plan
from tests.exec.train_runs import TRAINING, UNTIMED, common, losses, train_as_ranks, write_inputs


@pytest.mark.parametrize("runtime", ["flat_units", "fully_shard"])
def test_evaluation_disturbs_nothing(runtime, tmp_path):
    inputs = write_inputs(tmp_path)
    (inputs / "held.txt").write_text("a line of other text, some 12 words long, 1 of many\n" * 200)
    plan = (
        in_float64(small_plan(2, **TRAINING)) if runtime == "flat_units" else fsdp2_plan(2, recompute="full")
    )
    io.write_yaml(inputs / "plan.yaml", plan)
    asked = ["--eval-data", str(inputs / "held.txt"), "--eval-every", "1", "--eval-batches", "2"]
    for name, arguments in (("plain", []), ("asked", asked)):
        done = train_as_ranks(inputs, tmp_path / name, "--steps", "3", *UNTIMED, *arguments)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "asked") == losses(tmp_path / "plain")
    lines = lines_of(tmp_path / "asked")
    found = [line["eval_loss"] for line in lines]
    assert found[0] > found[1] > found[2] > 0
    assert "eval_loss:" in done.stdout


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def chats(path, answers):
    """Chats of a question longer than two sequences of 16 tokens and one of these answers."""
    question = {"role": "user", "content": "why 7 and not 8? " * 4}
    records = [[question, {"role": "assistant", "content": answer}] for answer in answers]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in records))
    return path


def sparse(inputs, out, *arguments, steps):
    """Train on chats.jsonl of `inputs`, of whose batches some have no target that counts."""
    given = common(inputs, out)
    given[given.index("--data") + 1] = str(inputs / "chats.jsonl")
    folder = out.with_name(f"{out.name}-ranks")
    folder.mkdir(exist_ok=True)
    return run_command(["train", *given, "--steps", str(steps), *UNTIMED, *arguments], 2, folder)


def test_a_batch_of_which_nothing_counts_counts_as_nothing(tmp_path):
    """Of a step: no update, said in its line. Of an evaluation: no weight. The same in every runtime."""
    chats(tmp_path / "chats.jsonl", ["because of 9"] * 30)
    found = {}
    for name, plan in {
        "flat": in_float64(small_plan(2, **TRAINING)),
        "fsdp2": fsdp2_plan(2),
        "split": split_plan(2, pipeline_parallel=2),
    }.items():
        training = {"seq_len": 16, "global_batch": 2, "bias_update_rate": 0.0}
        plain = io.to_plain(plan)
        io.write_text(tmp_path / "plan.yaml", io.to_yaml(plain | {"training": plain["training"] | training}))
        held = ["--eval-data", str(tmp_path / "chats.jsonl"), "--eval-every", "3"]
        code, said, error = sparse(tmp_path, tmp_path / name, *held, steps=9)
        assert code == 0, error
        found[name] = lines_of(tmp_path / name)
        idle = [line for line in found[name] if not line["targets"]]
        assert 0 < len(idle) < 9
        assert said.count("no target counts: no update") == len(idle)
        assert all(line["loss"] == line["grad_norm"] == 0 for line in idle)
        assert checkpoint.newest_state(tmp_path / name)[1].step == 9
    for name in ("fsdp2", "split"):
        for key in ("targets", "loss", "grad_norm"):
            expected = [line[key] for line in found["flat"]]
            assert [line[key] for line in found[name]] == pytest.approx(expected, rel=1e-9)
        asked = [line["eval_loss"] for line in found[name] if line["eval_loss"]]
        assert asked == pytest.approx([line["eval_loss"] for line in found["flat"] if line["eval_loss"]])
        assert len(asked) == 3


def test_every_target_weighs_the_same():
    """Whichever batch it is in."""
    counts, losses = (6, 0, 2), {6: 1.0, 2: 3.0}
    feed = SimpleNamespace(batches=lambda index: [SimpleNamespace(num_targets=counts[index])])
    runner = SimpleNamespace(evaluate=lambda batches: losses[batches[0].num_targets])
    assert Evaluation(feed, 3, 0, 1).loss(runner) == pytest.approx((6 * 1.0 + 2 * 3.0) / 8)


def test_data_of_which_nothing_counts_is_refused(tmp_path):
    plan = small_plan(2, seq_len=16, global_batch=2)
    question = [{"role": "user", "content": "why? " * 40}]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": question}) + "\n")
    tokens = data.prepare(data.DataOptions(source=str(path)), 300, tmp_path / "cache")
    with pytest.raises(MopError, match="--data: no target of it counts in the loss"):
        data.open_tokens(tokens, plan.training, 0)
    with pytest.raises(MopError, match="--eval-data: no target of it counts in the loss"):
        data.open_held_out(tokens, plan.training, 0, 8)
    chats(path, ["because"] * 3)
    tokens = data.prepare(data.DataOptions(source=str(path)), 300, tmp_path / "cache")
    seed = next(s for s in range(99) if not data.TokenDataset(tokens, 16, s).num_targets(range(2)))
    options = TrainOptions(plan="", out="", steps=1, eval_batches=1)
    with pytest.raises(MopError, match="--eval-batches: no target of the first 1 of --eval-data counts"):
        open_held_out(tokens, options, plan, seed)


def test_what_held_out_data_lacks_is_said_of_it(tmp_path):
    plan = small_plan(2, seq_len=16, global_batch=2)
    np.save(tmp_path / "short.npy", np.arange(9))
    tokens = data.prepare(data.DataOptions(source=str(tmp_path / "short.npy")), 300, tmp_path / "cache")
    with pytest.raises(MopError, match=r"^--data: the text has 9 tokens, too few for one sequence"):
        data.open_tokens(tokens, plan.training, 0)
    with pytest.raises(MopError, match=r"^--eval-data: the text has 9 tokens, too few for one sequence"):
        data.open_held_out(tokens, plan.training, 0, 8)


def test_the_last_checkpoint_is_there_before_the_evaluation(tmp_path):
    """And the step's line: what an evaluation breaks on costs neither."""
    inputs = write_inputs(tmp_path)
    held = inputs / "text.txt"
    folder = tmp_path / "ranks"
    folder.mkdir()
    options = {
        "plan": str(inputs / "plan.yaml"), "data": {"source": str(inputs / "text.txt")}, "steps": 2,
        "cache": str(inputs / "cache"), "out": str(tmp_path / "run"), "eval_data": {"source": str(held)},
    }  # fmt: skip
    code, _, error = run_command([json.dumps(options)], 2, folder, "tests.exec.train_plans")
    assert (code, "AttributeError" in error) == (1, True), error
    assert checkpoint.newest_state(tmp_path / "run")[1].step == 2
    assert len(losses(tmp_path / "run")) == 2
