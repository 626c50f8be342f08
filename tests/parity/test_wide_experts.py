"""Memory parity of routed experts in fp32 under autograd: torch's grouped products are in 16 bits alone."""

import pytest
from msgspec.structs import replace

from mopexec.measure.tracker import MemoryTracker
from mopsim.engine import simulate
from mopsim.spec.model import ModelSpec
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2
from tests.parity.tracked import halved, second_step
from tests.plans import plan_of, split
from tests.sim.toys import machine

MODEL = ModelSpec(
    name="wide", hidden_size=128, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4,
    head_dim=16, vocab_size=512, num_local_experts=8, num_experts_per_tok=2, moe_intermediate_size=128,
)  # fmt: skip
STRATEGIES: dict[str, Strategy] = {
    "fsdp2": fsdp2(2, expert_parallel=2, dtype="float32"),
    "split": split(2, expert_parallel=2, dtype="float32"),
}


@pytest.mark.parametrize(("name", "recompute", "biased"), halved(STRATEGIES, ("none", "full"), (False, True)))
def test_experts_run_one_by_one(name: str, recompute: str, biased: bool) -> None:
    """They were played as one product: 7 % high."""
    found, training = STRATEGIES[name], TrainSpec(seq_len=1024, global_batch=4)
    strategy = replace(found, activations=replace(found.activations, recompute=recompute, modules=()))
    plan = plan_of(replace(MODEL, expert_bias=biased), strategy, training, "cuda")
    tracked = second_step(plan, 0, MemoryTracker)
    result = simulate(plan.model, machine(memory=1000), 1, strategy, training, plan.stack)
    assert result.peak_memory == pytest.approx(tracked.peak_memory, rel=0.01)
