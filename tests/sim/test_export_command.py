"""mopsim export: what it writes and refuses, and what is simulated of a plan that loses something."""

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from mopsim.common import io
from mopsim.export.left import left
from mopsim.spec.capability import refusals
from mopsim.spec.plan import HardwareRef, Plan
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, mop
from tests.called import call
from tests.sim.test_export import plan


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source, out = tmp_path / "plan.yaml", tmp_path / "ds.json"
    io.write_yaml(source, plan(mop(32, expert_parallel=8, vocab_parallel=8)))
    common = ["--plan", str(source), "--to", "deepspeed", "--out", str(out)]
    assert call(monkeypatch, "export", *common) == 2
    err = capsys.readouterr().err
    assert "strategy.vocabulary.loss: 'ring'" in err
    assert len(err.strip().splitlines()) == 1
    assert not out.exists()
    shared = replace(fsdp2(32, context_parallel=2), stack="torchtitan")
    io.write_yaml(tmp_path / "shared.yaml", plan(shared))
    assert call(monkeypatch, "export", "--plan", str(tmp_path / "shared.yaml"), *common[2:]) == 2
    err = capsys.readouterr().err
    assert "only 'ring' or 'all_gather'" in err
    assert len(err.strip().splitlines()) == 1
    assert call(monkeypatch, "export", *common, "--lossy", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["not_expressed"][0]["field"] == "strategy.vocabulary.loss"
    assert json.loads(out.read_text())["zero_optimization"]["stage"] == 3
    assert call(monkeypatch, "export", *common[:-1], "-", "--lossy") == 0
    assert json.loads(capsys.readouterr().out)["train_batch_size"] == 64


def test_what_is_left_of_a_plan_is_simulated() -> None:
    """A ring over eight ranks of 32K tokens becomes all of their logits, layer inputs stay on the device."""
    machine = load_profile("h200-sxm-141g")
    hardware = HardwareRef(
        name=machine.name, digest=io.digest(machine), num_nodes=2, devices_per_node=8,
        memory_limit=machine.memory_limit(), host_limit=1,
    )  # fmt: skip
    strategy = mop(16, expert_parallel=8, vocab_parallel=8, offload_inputs=True, micro_batch=4)
    training = TrainSpec(seq_len=32768, global_batch=64)
    given = Plan(
        model=load_model("qwen3_30b_a3b"),
        hardware=hardware,
        strategy=strategy,
        training=training,
        stack=load_stack(strategy.stack),
    )
    gaps = list(refusals(given, by="torchtitan"))
    found = left(given, gaps)
    assert found.verdict.startswith("out of memory, logits are")
    assert found.peak_memory > found.memory_limit == machine.memory_limit()
    assert left(given, [gap for gap in gaps if gap.field.startswith("strategy.precision")]) is None
    other = replace(given, hardware=replace(hardware, digest="0"))
    assert "is not the one that it was planned on" in str(left(other, gaps))
