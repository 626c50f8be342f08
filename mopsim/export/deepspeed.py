"""DeepSpeed: its JSON configuration. Keys that begin with '_' are remarks, which DeepSpeed does not read."""

import json
from collections.abc import Iterator
from typing import Any

from mopsim.export.gaps import Gap, Target, common, header, only
from mopsim.spec.plan import Plan
from mopsim.spec.strategy import Strategy

CHECKED = (
    "DeepSpeed 0.19.6 (commit edaa722 of 2026-08-22): docs/_pages/config-json.md, runtime/zero/config.py"
)

#: AutoEP's presets for the networks it knows, by the beginning of the model's name.
PRESETS = {
    "mixtral": "mixtral",
    "qwen3": "qwen3_moe",
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def preset(plan: Plan) -> str | None:
    """AutoEP's preset of the plan's network, if it has one."""
    return next((value for start, value in PRESETS.items() if plan.model.name.startswith(start)), None)


def gaps(plan: Plan) -> Iterator[Gap]:
    """Fields of a plan that the JSON has no words for."""
    s, name = plan.strategy, "DeepSpeed"
    yield from common(plan, name)
    yield from only((1,), "pipeline.degree", s.pipeline.degree, f"is code in {name}, not configuration")
    if s.vocabulary.loss == "vocab_parallel":
        yield Gap("vocabulary.loss", "vocab_parallel", f"is not a setting of {name}")
    if s.vocabulary.fused:
        yield Gap("vocabulary.fused", True, f"is not a setting of {name}")
    if s.attention.sequence > 1:
        why = f"is not in {name}: its sequence parallelism is Ulysses"
        yield from only(("ulysses",), "attention.exchange", s.attention.exchange, why)
    if s.dense.tensor > 1 and s.attention.sequence > 1:
        yield Gap("dense.tensor", s.dense.tensor, f"with sequence parallelism is not in {name}")
    if s.dense.shard != s.stage_ranks // s.dense.tensor and s.dense.zero in (1, 2):
        yield Gap("dense.shard", s.dense.shard, "is not all ranks: only ZeRO-3 shards over fewer (MiCS)")
    if s.dense.zero == 3 and not s.dense.reshard_after_forward:
        yield Gap("dense.reshard_after_forward", False, f"with ZeRO-3 is not in {name}")
    if s.activations.recompute == "selective":
        yield Gap("activations.recompute", "selective", f"is not a setting of {name}")
    yield from _experts(plan)
    yield from _state(s)


def _experts(plan: Plan) -> Iterator[Gap]:
    s, e = plan.strategy, plan.strategy.experts
    yield from only((1,), "experts.tensor", e.tensor, "is not in DeepSpeed")
    yield from only(("all_to_all",), "experts.dispatch", e.dispatch, "is not in DeepSpeed")
    yield from only((False,), "experts.mapped", e.mapped, "is not in DeepSpeed")
    if plan.model.num_local_experts and e.shard != s.expert_replicas and s.dense.zero:
        yield Gap("experts.shard", e.shard, f"is not the {s.expert_replicas} replicas of an expert")
    if e.degree == 1:
        return
    if preset(plan) is None:
        yield Gap("experts.degree", e.degree, f"needs an AutoEP preset, and {plan.model.name} has none")
    beside = {
        "dense.tensor": s.dense.tensor > 1,
        "attention.sequence": s.attention.sequence > 1 and s.dense.zero == 3,
        "dense.shard": s.dense.zero == 3 and s.dense.shard != s.stage_ranks,
    }
    for field, clash in beside.items():
        if clash:
            part, key = field.split(".")
            yield Gap(field, getattr(getattr(s, part), key), "beside AutoEP and ZeRO-3 is not in DeepSpeed")


def _state(s: Strategy) -> Iterator[Gap]:
    p, name = s.precision, "DeepSpeed"
    yield from only(tuple(SHORT), "precision.compute", p.compute, f"is not in {name}")
    yield from only(
        (p.compute,), "precision.param", p.param, f"differs from precision.compute: not in {name}"
    )
    masters = ("param", "float32") if p.param == "float32" else ("float32",)
    yield from only(masters, "precision.master", p.master, f"is not mapped: {name} keeps fp32 masters")
    yield from only(("float32",), "precision.moments", p.moments, "is not mapped: moments are fp32")
    yield from only(tuple(SHORT), "precision.reduce", p.reduce, f"is not in {name}")
    yield from only(tuple(SHORT), "precision.grad", p.grad, f"is not in {name}")
    yield from only(("compute", p.compute), "precision.matmul", p.matmul, f"is not a setting of {name}")
    for tier in ("param_tier", "grad_tier"):
        if getattr(s.dense, tier) != getattr(s.experts, tier):
            yield Gap(
                f"experts.{tier}", getattr(s.experts, tier), f"differs from dense.{tier}: not in {name}"
            )
    if s.activations.boundary_tier == "host" and s.activations.recompute == "none":
        yield Gap("activations.boundary_tier", "host", "needs activations.recompute (cpu_checkpointing)")
    if s.dense.param_tier == "host" and s.dense.zero != 3:
        yield Gap("dense.param_tier", "host", "needs ZeRO-3")
    if s.dense.grad_tier == "host" and s.optimizer.update_on == "device":
        yield Gap("dense.grad_tier", "host", f"without an update on the host is not in {name}")
    if s.optimizer.state_tier == "host" and s.dense.zero == 0:
        yield Gap("optimizer.state_tier", "host", "needs ZeRO")
    if s.optimizer.host_fraction != 1 and s.dense.zero != 3:
        yield Gap("optimizer.host_fraction", s.optimizer.host_fraction, "needs ZeRO-3 (offload ratio)")


def sections(plan: Plan) -> dict[str, Any]:
    """The configuration's keys."""
    s, t = plan.strategy, plan.training
    adam = {
        "lr": t.learning_rate,
        "betas": [t.beta1, t.beta2],
        "eps": t.eps,
        "weight_decay": t.weight_decay,
    }
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
    if s.attention.sequence > 1:
        found["sequence_parallel_size"] = s.attention.sequence
    if s.dense.tensor > 1:
        found["tensor_parallel"] = {"autotp_size": s.dense.tensor}
    if s.experts.degree > 1:
        found["expert_parallel"] = {
            "enabled": True,
            "autoep_size": s.experts.degree,
            "preset_model": preset(plan),
        }
    if s.activations.recompute != "none":
        found["activation_checkpointing"] = {
            "partition_activations": False,
            "cpu_checkpointing": s.activations.boundary_tier == "host",
        }
    return found


def _zero(s: Strategy) -> dict[str, Any]:
    found: dict[str, Any] = {"stage": s.dense.zero, "overlap_comm": True}
    if s.dense.zero == 3 and s.dense.shard != s.stage_ranks // s.dense.tensor:
        found["mics_shard_size"] = s.dense.shard
    if s.optimizer.state_tier == "host" and s.dense.zero:
        found["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if s.dense.zero == 3:
            found["offload_optimizer"]["ratio"] = s.optimizer.host_fraction
    if s.dense.param_tier == "host" and s.dense.zero == 3:
        found["offload_param"] = {"device": "cpu", "pin_memory": True}
    return found


def render(plan: Plan, left_out: list[Gap]) -> str:
    """The JSON text; remarks under '_about' and '_not_expressed'."""
    about = header("DeepSpeed", CHECKED, plan, [])
    if plan.strategy.activations.recompute == "full":
        about.append("The model turns recomputation on, layer by layer (gradient_checkpointing_enable)")
    if plan.strategy.attention.sequence > 1:
        about.append(
            "UlyssesSPAttentionHF.register_with_transformers takes sequence_parallel_size and gives the mpu"
        )
    remarks: dict[str, Any] = {"_about": about}
    if left_out:
        remarks["_not_expressed"] = [str(gap) for gap in left_out]
    return json.dumps(remarks | sections(plan), indent=2) + "\n"


DEEPSPEED = Target("deepspeed", CHECKED, gaps, render)
