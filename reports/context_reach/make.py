"""Makes this report: `python -m reports.context_reach.make [--no-confirm]`.

Plans of MoP and of the baselines for 2 and 4 ranks, one network and the same limits; `mopexec reach` plays
each in dry runs, and trains the longest and the first failing length for real unless --no-confirm is given.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from mopsim.common import io
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import HardwareRef, Plan
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron, mop

HERE = Path(__file__).parent
RANKS = (2, 4)
DEVICE, HOST = 26 * 2**20, 50 * 2**20
"""Bytes of a rank: where full logits end at 1,024 tokens of it."""
MODEL = ModelSpec(
    name="reach_24l", hidden_size=64, num_hidden_layers=24, num_attention_heads=4, num_key_value_heads=4,
    head_dim=16, vocab_size=1792, num_local_experts=32, num_experts_per_tok=8, moe_intermediate_size=16,
    source="the papers' proportions (arXiv 2609.14306: V/H 27.9, expert width/H 0.286, top-8, every layer "
    "MoE), scaled to a CPU; width 16 is the nearest to 18.3 that torch's grouped products take",
)  # fmt: skip
STATE = {2: 24_379_392, 4: 12_189_696}
"""Bytes of a rank's parameters, gradients and moments on the host under FSDP2, rounded up, by ranks: 16 a
parameter. MoP has 12 of them there, master weights and moments."""


def changed(strategy: Strategy, **parts: dict[str, Any]) -> Strategy:
    """With other fields of its components."""
    replace = msgspec.structs.replace
    return replace(strategy, **{name: replace(getattr(strategy, name), **new) for name, new in parts.items()})


def contenders(ranks: int) -> dict[str, Strategy]:
    """By name; every one splits sequences and experts over all ranks, and keeps its optimizer on the host."""
    split: dict[str, Any] = {"context_parallel": ranks, "expert_parallel": ranks}
    plain = fsdp2(ranks, offload=True, prefetch=0, **split)
    chunked = changed(plain, vocabulary={"loss": "chunked", "chunk_tokens": 256})
    inputs = {"layer_inputs": "host", "host_budget": HOST - STATE[ranks]}
    selective = megatron(
        ranks, optimizer_on_host=1.0, recompute="selective", context_exchange="ulysses",
        recompute_modules=("core_attn", "moe"), **split,
    )  # fmt: skip
    selective = msgspec.structs.replace(selective, stack="mopexec-split")
    narrow = mop(
        ranks, vocab_parallel=ranks, expert_chunk_tokens=256, max_expert_chunks=256, loss_chunk_tokens=256,
        optimizer_bucket_params=50_000, offload_inputs_bytes=HOST - STATE[ranks] * 12 // 16, **split,
    )  # fmt: skip
    return {
        "fsdp2_full_logits": plain,
        "fsdp2_chunked_loss": chunked,
        "fsdp2_inputs_on_host": changed(chunked, activations=inputs),
        "megatron_selective": changed(selective, vocabulary={"loss": "chunked", "chunk_tokens": 256}),
        "mop": narrow,
        "mop_bfloat16_sums": changed(narrow, precision={"grad": "bfloat16", "reduce": "bfloat16"}),
        "mop_unclipped": changed(narrow, optimizer={"overlap": "backward"}),
    }


def plan(name: str, strategy: Strategy) -> Plan:
    """The plan as a CPU runs it; experts are grouped products, as a GPU's."""
    stack = load_stack(strategy.stack).on_kind("cpu")
    kernels = msgspec.structs.replace(stack.kernels, expert_products="torch", expert_outputs="whole")
    stack = msgspec.structs.replace(stack, kernels=kernels)
    hardware = HardwareRef(
        name="enforced-limits", digest="none", num_nodes=1, devices_per_node=strategy.world_size,
        memory_limit=DEVICE, host_limit=HOST,
    )  # fmt: skip
    strategy = msgspec.structs.replace(stack.resolve(strategy), name=name)
    clipped = float(strategy.optimizer.overlap != "backward")  # an early update is of gradients as they are
    return Plan(
        model=MODEL, hardware=hardware, strategy=strategy, stack=stack,
        training=TrainSpec(seq_len=2048, global_batch=1, warmup_steps=0, clip_norm=clipped),
    )  # fmt: skip


def main(options: list[str]) -> None:
    command = [sys.executable, "-m", "mopexec.cli", "reach"]
    for ranks in RANKS:
        for name, strategy in contenders(ranks).items():
            path = HERE / "plans" / f"{name}_{ranks}.yaml"
            io.write_yaml(path, plan(name, strategy))
            command += ["--plan", str(path.relative_to(Path.cwd()))]
    limits = ["--device-limit", str(DEVICE), "--host-limit", str(HOST)]
    subprocess.run([*command, *limits, "--out", str(HERE.relative_to(Path.cwd())), *options], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
