"""Small plans for tests of training; as a module, the command with the fake runner."""

import json
import sys

from mopsim.common import io
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import HardwareRef, Plan, Prediction
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Attention, Dense, Experts, Precision, Strategy, Vocabulary
from mopsim.spec.training import TrainSpec

FLOAT32 = Precision(compute="float32", param="float32", reduce="float32", grad="float32", master="param")


def small_model(**fields):
    values = {
        "name": "small", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300, "num_local_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    }  # fmt: skip
    return ModelSpec(**{**values, **fields})


def small_plan(world_size=2, **training):
    strategy = Strategy(
        name="mop",
        world_size=world_size,
        dense=Dense(fsdp=world_size),
        attention=Attention(context_parallel=world_size),
        experts=Experts(expert_parallel=world_size, chunk_tokens=16),
        vocabulary=Vocabulary(vocab_parallel=world_size, loss="ring"),
        precision=FLOAT32,
    )
    return Plan(
        model=small_model(),
        hardware=HardwareRef(
            name="cpu", digest="x", num_nodes=1, devices_per_node=4, memory_limit=1 << 30, host_limit=1 << 30
        ),
        strategy=strategy,
        stack=load_stack(strategy.stack),
        training=TrainSpec(**{"seq_len": 64, "global_batch": 4, "learning_rate": 3e-3, **training}),
        prediction=Prediction(
            step_time=0.1, tokens_per_second=2560.0, peak_memory=1 << 20, host_memory=0,
            memory_by_category={}, time_by_kind={},
        ),
    )  # fmt: skip


def main(arguments):
    from mopexec.cli.train import train
    from mopexec.run.options import TrainOptions

    options = json.loads(arguments[0])
    restarts = options.pop("restarts", 0)
    options["build"] = "tests.exec.fake_runner:build"
    sys.exit(train(io.convert(options, TrainOptions, "options"), None, restarts))


if __name__ == "__main__":
    main(sys.argv[1:])
