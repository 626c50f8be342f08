"""The two runtimes train the same model on the same text: their loss curves agree, by the real command."""

import json
from pathlib import Path

import pytest

from mopsim.common import io
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import HardwareRef, Plan
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import DType, Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, mop
from tests.exec.spawn import run_command

TEXT = "".join(f"{i} squared is {i * i}, and the fox jumps over {i % 7} dogs\n" for i in range(4000))
MODEL = ModelSpec(
    name="curves", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, vocab_size=300, intermediate_size=48, first_k_dense_replace=1, num_local_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
)  # fmt: skip
HARDWARE = HardwareRef(
    name="any", digest="none", num_nodes=1, devices_per_node=2, memory_limit=2**33, host_limit=2**33
)


def every_mechanism(precision: DType) -> Strategy:
    return mop(
        2, context_parallel=2, expert_parallel=2, vocab_parallel=2, expert_chunk_tokens=16,
        ffn_chunk_tokens=16, loss_chunk_tokens=16,
        optimizer_bucket_params=3000, offload_inputs=True, offload_inputs_bytes=9000, dtype=precision,
    )  # fmt: skip


def baseline(precision: DType) -> Strategy:
    return fsdp2(
        2,
        context_parallel=2,
        expert_parallel=2,
        offload=True,
        loss="chunked",
        loss_chunk_tokens=16,
        dtype=precision,
    )


def losses(folder: Path, strategy: Strategy, steps: int) -> list[float]:
    """The losses of `steps` optimizer steps of the real command on two ranks."""
    training = TrainSpec(seq_len=64, global_batch=2, learning_rate=3e-3, clip_norm=0.5, seed=1)
    io.write_yaml(
        folder / "plan.yaml",
        Plan(
            model=MODEL,
            hardware=HARDWARE,
            strategy=strategy,
            training=training,
            stack=load_stack(strategy.stack),
        ),
    )
    (folder / "text.txt").write_text(TEXT)
    paths = {"plan": "plan.yaml", "data": "text.txt", "cache": "../cache", "out": "run"}
    words = [word for name, path in paths.items() for word in (f"--{name}", str(folder / path))]
    words += ["--steps", str(steps), "--profile-steps", "0", "--no-final-checkpoint"]
    code, _, err = run_command(["train", *words], 2, folder)
    assert code == 0, err
    return [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_loss_curves_agree(tmp_path: Path) -> None:
    curves, steps = [], 8
    for name, strategy in (("mop", every_mechanism("float64")), ("fsdp2", baseline("float64"))):
        (tmp_path / name).mkdir()
        curves.append(losses(tmp_path / name, strategy, steps))
    assert len(curves[0]) == steps
    assert curves[0] == pytest.approx(curves[1], rel=1e-9)
    assert curves[0][-1] < curves[0][0]
