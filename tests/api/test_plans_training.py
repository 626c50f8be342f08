"""What a plan says of training counts where the job says nothing of it."""

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

import mopsim
from mopsim.common import io
from mopsim.spec.plan import Plan
from tests.api.test_api import JOB, TINY, command

OF_PLAN: dict[str, Any] = {
    "attention_mask": "document", "clip_norm": 0.0, "mtp_loss_coef": 0.0, "router_aux_loss_coef": 0.01,
    "router_z_loss_coef": 0.001, "learning_rate": 1e-3, "warmup_steps": 5, "seed": 7,
}  # fmt: skip


def planned(**training: Any) -> Plan:
    plan = mopsim.simulate(**JOB, strategy=TINY).plan()
    return replace(plan, training=replace(plan.training, **training))


def test_a_plan_is_simulated_as_it_is_trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan, path, out = planned(**OF_PLAN), tmp_path / "plan.yaml", tmp_path / "out.yaml"
    step = mopsim.simulate(**JOB, strategy=plan)
    assert step.plan().training == plan.training
    assert step.step_time_s != mopsim.simulate(**JOB, strategy=TINY).step_time_s
    assert any("attention_mask document" in one for one in step.notes)
    io.write_yaml(path, plan)
    options = ["--seq-len", "256", "--global-batch", "4", "--strategy", str(path), "--plan", str(out)]
    command(monkeypatch, "simulate", "--model", "tiny", "--hardware", "cpu-2core", *options, "--seed", "3")
    assert io.load(out, Plan, "plan").training == replace(plan.training, seed=3)


def test_what_the_job_says_is_not_the_plans() -> None:
    step = mopsim.simulate(**JOB | {"seq_len": 128}, strategy=planned(routing="50/1", seed=7), seed=3)
    training = step.plan().training
    assert (training.seq_len, training.routing, training.seed) == (128, "balanced", 3)
    for said in ("seq_len 256 (here 128)", "routing 50/1 (here balanced)", "seed 7 (here 3)"):
        assert any(said in one for one in step.notes), said


def test_shorter_sequences_cut_the_documents_of_a_plan() -> None:
    apart = planned(attention_mask="document", document_tokens=200, mtp_loss_coef=0.0)
    step = mopsim.simulate(**JOB | {"seq_len": 128}, strategy=apart)
    assert step.plan().training.document_tokens == 128
    assert any("document_tokens 128" in one for one in step.notes)
    made = mopsim.compare(**JOB, strategies={"plan": apart}, sweep=("seq_len", [128, 256]))
    assert [len(point.results) for point in made.sweep.points] == [1, 1]


def test_plans_that_agree_train_all_that_are_compared() -> None:
    document = planned(attention_mask="document", mtp_loss_coef=0.0)
    alike = mopsim.compare(**JOB, strategies={"plan": document, "other": TINY})
    assert alike.simulations["other"].inputs.training == document.training
    assert not any("not compared on one training" in one for one in alike.notes)
    unlike = mopsim.compare(**JOB, strategies={"one": document, "two": planned()})
    said = "one training: mtp_loss_coef 0.0 (one), 0.3 (two); attention_mask document (one), causal (two)"
    assert any(said in one for one in unlike.notes), unlike.notes
    masks = [one.plan().training.attention_mask for one in unlike.simulations.values()]
    assert masks == ["document", "causal"]
