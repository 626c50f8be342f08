"""Networks and steps that the tests of Megatron's parallelism share."""

import msgspec

from mopsim.engine import SimResult, simulate
from mopsim.spec.model import ModelSpec
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import megatron
from tests.sim.toys import machine, small

MACHINE = machine(memory=10_000.0)


def deep(layers: int = 8, **changes: object) -> ModelSpec:
    """A dense network whose embedding and head hardly count."""
    fields = {
        "num_hidden_layers": layers,
        "first_k_dense_replace": 0,
        "num_local_experts": 0,
        "vocab_size": 8,
    }
    fields |= {"num_experts_per_tok": 0, "moe_intermediate_size": 0, "shared_expert_intermediate_size": 0}
    return small(**{**fields, "hidden_size": 1024, "head_dim": 128, "intermediate_size": 4096, **changes})


def with_(strategy: Strategy, **changes: object) -> Strategy:
    return msgspec.structs.replace(strategy, **changes)


def play(model: ModelSpec, strategy: Strategy, batch: int, seq_len: int = 256, nodes: int = 4) -> SimResult:
    return simulate(model, MACHINE, nodes, strategy, TrainSpec(seq_len=seq_len, global_batch=batch))


def parted(*layers: int) -> Strategy:
    """A pipeline of two stages whose parts hold `layers`."""
    strategy = megatron(8, pipeline_parallel=2)
    return with_(strategy, pipeline=msgspec.structs.replace(strategy.pipeline, layers=layers))
