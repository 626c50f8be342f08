"""DeepSpeed: its JSON configuration. Keys that begin with '_' are remarks, which DeepSpeed does not read."""

from collections.abc import Sequence
from typing import Any

from mopsim.common.errors import SpecError
from mopsim.common.io import as_json
from mopsim.export.target import Target, header, unsaid
from mopsim.spec.capability.expressions import experts_of
from mopsim.spec.plan import Plan
from mopsim.spec.strategy import Strategy

CHECKED = (
    "DeepSpeed 0.19.6 (commit edaa722 of 2026-08-22): docs/_pages/config-json.md, runtime/zero/config.py"
)

RECOMPUTED = {
    "device": "The model turns recomputation on, layer by layer (gradient_checkpointing_enable)",
    "host": "cpu_checkpointing is read by deepspeed.checkpointing.configure and acts where the model calls "
    "DeepSpeed's checkpoint: model._set_gradient_checkpointing(True, deepspeed.checkpointing.checkpoint). "
    "gradient_checkpointing_enable calls torch's, which leaves the layers' inputs on the device",
}
"""Who recomputes layers, by where their inputs wait."""
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def sections(plan: Plan) -> dict[str, Any]:
    """The configuration's keys."""
    s, t = plan.strategy, plan.training
    adam = {"lr": t.learning_rate, "betas": [t.beta1, t.beta2], "eps": t.eps, "weight_decay": t.weight_decay}
    found: dict[str, Any] = {
        "train_batch_size": t.global_batch,
        "train_micro_batch_size_per_gpu": s.micro_batch,
        "gradient_accumulation_steps": t.num_microbatches(s),
        "gradient_clipping": t.clip_norm,
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_optimization": _zero(s),
        "communication_data_type": SHORT.get(s.precision.reduce, "fp32"),
        "data_types": {"grad_accum_dtype": SHORT.get(s.precision.grad, "fp32")},
    }
    if t.warmup_steps:
        warmup = {
            "warmup_min_lr": 0.0,
            "warmup_max_lr": t.learning_rate,
            "warmup_num_steps": t.warmup_steps,
            "warmup_type": "linear",
        }
        found["scheduler"] = {"type": "WarmupLR", "params": warmup}
    if s.precision.compute in ("bfloat16", "float16"):
        found[SHORT[s.precision.compute]] = {"enabled": True}
    if s.attention.context_parallel > 1:
        found["sequence_parallel_size"] = s.attention.context_parallel
    if s.dense.tensor_parallel > 1:
        found["tensor_parallel"] = {"autotp_size": s.dense.tensor_parallel}
    if s.experts.expert_parallel > 1:
        found["expert_parallel"] = {
            "enabled": True,
            "autoep_size": s.experts.expert_parallel,
            "preset_model": experts_of("deepspeed", plan.model.name),
        }
    if s.activations.recompute != "none":
        found["activation_checkpointing"] = {
            "partition_activations": False,
            "cpu_checkpointing": s.activations.layer_inputs == "host",
        }
    return found


def _zero(s: Strategy) -> dict[str, Any]:
    found: dict[str, Any] = {
        "stage": s.dense.zero,
        "overlap_comm": s.overlap.grad_reduce or s.dense.zero == 3,
    }
    if s.dense.zero == 3 and s.dense.fsdp != s.dense_replicas:
        found["mics_shard_size"] = s.dense.fsdp
    if s.optimizer.state_tier == "host" and s.dense.zero:
        found["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if s.dense.zero == 3:
            found["offload_optimizer"]["ratio"] = s.optimizer.host_fraction
    if s.dense.param_tier == "host" and s.dense.zero == 3:
        found["offload_param"] = {"device": "cpu", "pin_memory": True}
    return found


def render(plan: Plan, left_out: Sequence[SpecError]) -> str:
    """The JSON text; remarks under '_about' and '_not_expressed'."""
    about = header("DeepSpeed", CHECKED, plan, [], "deepspeed")
    activations = plan.strategy.activations
    if activations.recompute == "full":
        about.append(RECOMPUTED[activations.layer_inputs])
    if plan.strategy.attention.context_parallel > 1:
        about.append(
            "UlyssesSPAttentionHF.register_with_transformers takes sequence_parallel_size and gives the mpu"
        )
    remarks: dict[str, Any] = {"_about": about}
    if left_out:
        remarks["_not_expressed"] = [str(gap) for gap in left_out]
    return as_json(remarks | unsaid(sections(plan), left_out, "deepspeed"), indent=2) + "\n"


DEEPSPEED = Target("deepspeed", CHECKED, render)
