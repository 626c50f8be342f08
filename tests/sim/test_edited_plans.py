"""A plan that was edited has no prediction of its own; what does not move time or memory may be edited."""

from pathlib import Path

from msgspec.structs import replace

import mopsim
from mopsim.common import io
from mopsim.export.target import header
from mopsim.spec.plan import Plan
from mopsim.spec.upgrade import load_plan
from mopsim.strategies import megatron


def _plan(path: Path) -> Plan:
    found = mopsim.simulate(
        "tiny", "h100-sxm-80g", nodes=1, strategy=megatron(8, recompute="none"), seq_len=1024, global_batch=8,
        stack="megatron-core",
    )  # fmt: skip
    found.save_plan(path)
    return load_plan(path)


def _again(made: Plan, path: Path) -> Plan:
    io.write_yaml(path, made)
    return load_plan(path)


def test_a_plan_knows_that_it_was_edited(tmp_path: Path) -> None:
    made = _plan(tmp_path / "plan.yaml")
    assert made.prediction is not None
    assert not made.edited
    assert made.predicted == made.prediction
    activations = replace(made.strategy.activations, recompute="full")
    edits = [
        replace(made, strategy=replace(made.strategy, activations=activations)),
        replace(made, training=replace(made.training, seq_len=2048)),
        replace(made, stack=replace(made.stack, kernels=replace(made.stack.kernels, norm="composed"))),
        replace(made, model=replace(made.model, vocab_size=2 * made.model.vocab_size)),
        replace(made, hardware=replace(made.hardware, num_nodes=2)),
    ]
    for place, edit in enumerate(edits):
        read = _again(edit, tmp_path / f"{place}.yaml")
        assert read.edited, place
        assert read.predicted is None
    same = _again(replace(made, training=replace(made.training, weight_decay=0.05)), tmp_path / "same.yaml")
    assert not same.edited
    old = _again(replace(made, prediction=replace(made.prediction, of="")), tmp_path / "old.yaml")
    assert not old.edited


def test_an_export_predicts_an_edited_plan_anew(tmp_path: Path) -> None:
    made = _plan(tmp_path / "plan.yaml")
    activations = replace(made.strategy.activations, recompute="full")
    edited = replace(made, strategy=replace(made.strategy, activations=activations))
    before, after = ("\n".join(header("megatron-bridge", one, [])) for one in (made, edited))
    assert "mopsim predicts" in before
    assert "mopsim predicts" not in after
    assert "The plan was edited since it was predicted. For the stack megatron-core: " in after
    assert "GiB" in after or "MiB" in after
