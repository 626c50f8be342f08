"""An export writes a field or refuses it by name: another value makes another file."""

import pytest

from mopsim.export import export
from mopsim.spec.capability import Job, Side
from mopsim.spec.presets import load_model
from mopsim.spec.strategy import MatmulDType, Overlap, Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron, zero_offload
from tests.capability.jobs import plan_of, refusal, replace, variants

TRAINING = TrainSpec(seq_len=4096, global_batch=64)


def said() -> dict[str, tuple[Side, Strategy]]:
    """Strategies that a target can say in full, with its mechanisms at work."""
    tuned = megatron(
        8, tensor_parallel=2, pipeline_parallel=2, virtual_stages=2, expert_parallel=2, recompute="selective",
        overlap=Overlap(grad_reduce=True, pipeline=True, tensor=True, experts=True),
    )  # fmt: skip
    inputs = megatron(8, context_parallel=2, expert_parallel=2, offload_inputs=True)
    hosted = megatron(8, context_parallel=2, expert_parallel=2)
    hosted = replace(
        hosted, optimizer=replace(hosted.optimizer, state_tier="host", update_on="host", host_fraction=0.5)
    )
    sharded = megatron(8, expert_parallel=2)
    sharded = replace(sharded, dense=replace(sharded.dense, zero=3, prefetch=1, reshard_after_forward=True))
    gathered = fsdp2(8, context_parallel=2, context_exchange="all_gather", expert_parallel=2)
    gathered = replace(gathered, stack="torchtitan")
    return {
        "torchtitan": ("torchtitan", fsdp2(8, expert_parallel=2)),
        "torchtitan, tensor": ("torchtitan", fsdp2(8, tensor_parallel=2, expert_parallel=2)),
        "torchtitan, gathered": ("torchtitan", gathered),
        "torchtitan, offloaded": ("torchtitan", fsdp2(8, offload=True)),
        "torchtitan-main": ("torchtitan-main", fsdp2(8, expert_parallel=2)),
        "torchtitan-main, gathered": ("torchtitan-main", gathered),
        "torchtitan-main, offloaded": ("torchtitan-main", fsdp2(8, offload=True)),
        "megatron-bridge": ("megatron-bridge", tuned),
        "megatron-bridge, inputs": ("megatron-bridge", inputs),
        "megatron-bridge, hosted": ("megatron-bridge", hosted),
        "megatron-bridge, fsdp": ("megatron-bridge", sharded),
        "deepspeed": ("deepspeed", zero_offload(8, expert_parallel=2, offload_inputs=True)),
        "deepspeed, ulysses": ("deepspeed", zero_offload(8, context_parallel=2, fsdp=4)),
    }


CASES = said()


def file(job: Job, target: Side) -> str:
    """The file without its remarks: what the target reads."""
    text, gaps = export(plan_of(job), target)
    assert not gaps
    return "\n".join(
        line for line in text.splitlines() if not line.startswith("#") and '"_about"' not in line
    )


@pytest.mark.parametrize("name", CASES)
def test_a_field_is_written_or_refused_and_never_ignored(name: str) -> None:
    target, strategy = CASES[name]
    # the norm of a layer's input is a module of its own with latent attention alone
    latent = name == "megatron-bridge, inputs"
    job = Job(load_model("deepseek_v3" if latent else "qwen3_30b_a3b"), strategy, TRAINING).settled
    base = file(job, target)
    wrong = []
    for variant in variants(name, job, ("strategy", "model", "training")):
        if any(refusal(variant, side) for side in (target, "simulator")) or variant.path == "strategy.name":
            continue
        same = file(variant.job, target) == base
        if same and variant.reads(target) and variant.acts:
            wrong.append(f"{variant}: ignored")
    assert not wrong, "\n" + "\n".join(wrong)


def test_a_loss_that_is_read_after_the_backward_is_checked_too() -> None:
    """check_for_nan_in_loss is true or false, whenever a stack reads the loss."""
    base = plan_of(Job(load_model("qwen3_30b_a3b"), CASES["megatron-bridge"][1], TRAINING).settled)
    for read, said in ((False, "false"), (True, "true"), ("after_backward", "true")):
        host = replace(base.stack.host, loss_read=read)
        text, _ = export(replace(base, stack=replace(base.stack, host=host)), "megatron-bridge")
        assert f"check_for_nan_in_loss: {said}" in text


@pytest.mark.parametrize("matmul", ["fp8", "mxfp8", "nvfp4"])
def test_weights_lie_in_the_recipes_dtype_under_the_distributed_optimizer_alone(matmul: MatmulDType) -> None:
    for zero, said in ((0, "false"), (1, "true")):
        strategy = CASES["megatron-bridge"][1]
        strategy = replace(
            strategy, dense=replace(strategy.dense, zero=zero),
            precision=replace(strategy.precision, matmul=matmul),
        )  # fmt: skip
        text, _ = export(
            plan_of(Job(load_model("qwen3_30b_a3b"), strategy, TRAINING).settled), "megatron-bridge"
        )
        assert f"{'fp4' if matmul == 'nvfp4' else 'fp8'}_param_gather: {said}" in text
