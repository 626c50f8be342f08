"""Master weights begin with the source's own values, not with those of the parameters' dtype."""

from typing import Any

from msgspec.structs import replace

from mopsim.spec.presets import load_model
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, mop, zero_offload
from tests.exec.spawn import pool
from tests.plans import plan_of, split

MODEL = replace(
    load_model("tiny"), num_nextn_predict_layers=0, num_hidden_layers=2, hidden_size=64, vocab_size=256
)
STRATEGIES: dict[str, Strategy] = {
    "mop": mop(2, expert_parallel=2, vocab_parallel=2),
    "mop, optimizer beside the next step": mop(2, optimizer_overlap=True, optimizer_bucket_params=5000),
    "zero_offload": zero_offload(2, expert_parallel=2),
    "split, tensor": split(2, tensor_parallel=2, expert_parallel=2),
    "split, data": split(2),
    "split, pipeline": split(2, pipeline_parallel=2),
    "split, expert-tensor": split(2, tensor_parallel=2, expert_tensor_parallel=2),
    "split, host": split(2, optimizer_on_host=1.0),
    "fsdp2": fsdp2(2, expert_parallel=2),
    "fsdp2, host": fsdp2(2, offload=True),
}


def test_masters_are_not_rounded() -> None:
    """One step at a learning rate of 0 and an export changed float32 weights by 2^-9 under bf16."""
    training = TrainSpec(seq_len=32, global_batch=4)
    plans: dict[str, Any] = {name: plan_of(MODEL, one, training) for name, one in STRATEGIES.items()}
    found = pool(2).run("tests.exec.weights_worker", "rounded", plans)[0]
    for name, plan in plans.items():
        assert plan.strategy.precision.compute == "bfloat16", name
        assert set(found[name].values()) == {(0.0, 0.0)}, (name, found[name])
