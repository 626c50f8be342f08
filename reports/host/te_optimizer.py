"""What the host does for Megatron-Core's distributed optimizer and the ends of its steps.

    python -m reports.host.te_optimizer --sources TransformerEngine/transformer_engine \\
        SITE_PACKAGES/megatron --json reports/host/te_optimizer.json

As te_layers.py measures the layers, which tells how to install what it needs: the model of te_layers.py with
2 to 16 local experts, whose weights are parameters of their own, on eight ranks of a fake group. A rank's
share of a buffer is a range of it, so that the line through them tells what each parameter of the optimizer
takes, by part of a step. Kernels of many tensors (multi_tensor_apply) are one op of torch each: what their
C++ does for a tensor is not in it. `zero all` is for each parameter of the model, the optimizer's or not.
`collection` is one gc.collect() with torch's compiler and transformers imported. Megatron-LM's training loop,
whose norm of parameters is one of the parts, wants `pip install six regex`.
"""

import gc
import importlib
from collections.abc import Callable
from statistics import linear_regression
from time import thread_time as clock
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from reports.host import te_extension, te_layers

ROUNDS, WARM = 100, 5
te_extension.HERE |= {f"torch.cuda.{kind}Tensor": f"torch.{kind}Tensor" for kind in ("Float", "BFloat16")}
AWARE: dict[str, Any] = {"use_precision_aware_optimizer": True, "exp_avg_dtype": torch.float32}
NARROW = dict.fromkeys(("exp_avg_dtype", "exp_avg_sq_dtype"), torch.bfloat16)
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "fp32 gradients": ({}, True), "bf16 gradients": ({}, False),
    "precision-aware": (AWARE, True), "bf16 moments": (AWARE | NARROW, True),
}  # fmt: skip
"""The optimizer's settings, and whether gradients are summed in fp32."""


def made(experts: int, more: dict[str, Any], wide: bool) -> tuple[Any, Any]:
    """Layers in data parallelism and their optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    model = te_layers.network(experts)
    parallel = DistributedDataParallelConfig(
        grad_reduce_in_fp32=wide, overlap_grad_reduce=True, use_distributed_optimizer=True
    )
    outer = DistributedDataParallel(model.config, parallel, model)
    config = OptimizerConfig(
        optimizer="adam", lr=1e-3, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True,
        clip_grad=1e-9, **more,
    )  # fmt: skip
    return outer, get_megatron_optimizer(config, [outer], use_gloo_process_groups=False)


def parts(outer: Any, optimizer: Any) -> dict[str, Callable[[], object]]:
    """A step's parts, in their order (ChainedOptimizer.step)."""
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32 as clipped

    every = optimizer.chained_optimizers

    def clip() -> None:
        for one in every:
            aware = one.config.use_precision_aware_optimizer
            clipped(one.get_parameters(), 1e-9, 1.0, aware)

    from megatron.training import utils

    utils.get_args = lambda: SimpleNamespace(use_megatron_fsdp=False, bf16=True)
    return {
        "zero all": outer.zero_grad_buffer,
        "zero": optimizer.zero_grad,
        "gradients": optimizer.prepare_grads,
        "norm": optimizer.get_grad_norm,
        "clip": clip,
        "zeros": optimizer.count_zeros,
        "parameters' norm": lambda: utils.calc_params_l2_norm(outer),
        "adam": lambda: [one.optimizer.step() for one in every],
        "parameters": lambda: [one._copy_main_params_to_model_params() for one in every],
    }


def timed(steps: dict[str, dict[str, Callable[[], object]]]) -> tuple[float, dict[str, dict[str, float]]]:
    """Seconds of a Linear, and Linears of each part of each step: the least of many rounds."""
    unit, rows = nn.Linear(16, 16).to(torch.bfloat16), torch.randn(8, 16, dtype=torch.bfloat16)
    one, found = float("inf"), {name: dict.fromkeys(calls, float("inf")) for name, calls in steps.items()}
    for at in range(ROUNDS + WARM):
        begin = clock()
        for _ in range(1000):
            unit(rows)
        one = min(one, (clock() - begin) / 1000)
        for name, calls in steps.items():
            for part, call in calls.items():
                begin = clock()
                call()
                took = clock() - begin
                found[name][part] = min(found[name][part], took) if at >= WARM else found[name][part]
    return one, {name: {part: s / one for part, s in took.items()} for name, took in found.items()}


def collection() -> float:
    """Seconds of a collection of what a training process at least has imported."""
    for name in ("torch._inductor.compile_fx", "transformers.models.qwen3_moe.modeling_qwen3_moe"):
        importlib.import_module(name)
    took = []
    for _ in range(5):
        begin = clock()
        gc.collect()
        took.append(clock() - begin)
    return min(took)


def main() -> None:
    target, core = te_layers.begun(__doc__)
    te_layers.spread_experts()
    steps, owned, whole = {}, {}, {}
    for kind, (more, wide) in KINDS.items():
        for n in te_layers.EXPERTS:
            outer, optimizer = made(n, more, wide)
            steps[f"{kind}, {n}"] = parts(outer, optimizer)
            owned[n] = len([p for one in optimizer.chained_optimizers for p in one.get_parameters()])
            whole[n] = len(outer.params_with_grad)
    one, took = timed(steps)
    steps.clear()
    collected, objects = collection(), len(gc.get_objects())
    found: dict[str, Any] = {"parameters": owned, "all_parameters": whole}
    found["collection"] = {"objects": objects, "linears": collected / one}
    for kind in KINDS:
        found[kind] = {}
        for part in parts(*made(2, *KINDS[kind])):
            count = whole if part == "zero all" else owned
            each, rest = linear_regression(
                [count[n] for n in te_layers.EXPERTS],
                [took[f"{kind}, {n}"][part] for n in te_layers.EXPERTS],
            )
            found[kind][part] = {"each": each, "step": rest}
    te_layers.written(target, core, {te_layers.UNIT: one}, found)


if __name__ == "__main__":
    main()
