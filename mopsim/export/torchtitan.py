"""TorchTitan: a TOML file of its JobConfig. Newer versions configure in Python, with other names."""

from collections.abc import Iterator, Mapping
from typing import Any

from mopsim.export.gaps import Gap, Target, common, header, only
from mopsim.spec.layout import ceil_div
from mopsim.spec.plan import Plan
from mopsim.spec.strategy import Strategy

CHECKED = "torchtitan v0.2.2 (commit 73a0e69), torchtitan/config/job_config.py"

#: Presets that TorchTitan has a model of: (model.name, model.flavor).
MODELS = {
    "deepseek_v3": ("deepseek_v3", "671B"),
    "qwen3_30b_a3b": ("qwen3", "30B-A3B"),
    "qwen3_235b_a22b": ("qwen3", "235B-A22B"),
    "gpt_oss_20b": ("gpt_oss", "20b"),
    "gpt_oss_120b": ("gpt_oss", "120b"),
}
SCHEDULES = {"1f1b": "1F1B", "interleaved": "Interleaved1F1B", "zero_bubble": "InterleavedZeroBubble"}
ROTATE = {"all_gather": "allgather", "ring": "alltoall"}
MATMUL = {"fp8": "float8", "mxfp8": "mx"}


def replicas(s: Strategy) -> int:
    """Copies of the dense state: data_parallel_replicate_degree."""
    return max(1, s.stage_ranks // (s.dense.tensor * s.dense.shard))


def gaps(plan: Plan) -> Iterator[Gap]:
    """Fields of a plan that v0.2.2 has no words for."""
    s, name = plan.strategy, "TorchTitan"
    yield from common(plan, name)
    yield from only((False,), "experts.mapped", s.experts.mapped, f"is not mapped to {name}")
    if plan.model.name not in MODELS:
        yield Gap("model.name", plan.model.name, f"is not a model that {name} has a flavor of")
    yield from only((3,), "dense.zero", s.dense.zero, f"is not in {name}: fully_shard shards everything")
    if s.dense.shard % s.attention.sequence or s.stage_ranks % (s.dense.tensor * s.dense.shard):
        yield Gap("dense.shard", s.dense.shard, "is not context parallelism x a data-parallel degree")
    if s.dense.tensor > 1 and not s.dense.sequence_parallel:
        yield Gap(
            "dense.sequence_parallel", False, f"is not in {name}: tensor parallelism always splits rows"
        )
    if s.attention.sequence > 1:
        why = f"is not in {name}: context parallelism gathers keys and values, or rotates them"
        yield from only(tuple(ROTATE), "attention.exchange", s.attention.exchange, why)
    yield from _experts(s)
    if s.vocabulary.loss == "vocab_parallel" and s.vocabulary.degree != s.dense.tensor:
        yield Gap("vocabulary.degree", s.vocabulary.degree, "is not the tensor-parallel degree")
    if s.vocabulary.fused:
        yield Gap("vocabulary.fused", True, f"is not a setting of {name}")
    if s.pipeline.schedule == "zero_bubble" and s.pipeline.virtual_stages == 1 and s.pipeline.degree > 1:
        yield Gap("pipeline.schedule", "zero_bubble", "needs two stages a rank or more")
    yield from only(((),), "pipeline.layers", s.pipeline.layers, f"is not mapped to {name}'s stages")
    yield from only(("none", "full"), "activations.recompute", s.activations.recompute,
                    f"of named modules is not in {name}: it selects operators")  # fmt: skip
    if s.activations.boundary_tier == "host":
        yield Gap("activations.boundary_tier", "host", f"is not in {name}")
    yield from _state(s)


def _experts(s: Strategy) -> Iterator[Gap]:
    e = s.experts
    if e.degree > 1:
        yield from only((1, s.dense.tensor), "experts.tensor", e.tensor, "must be 1 or the tensor degree")
    elif e.tensor != s.dense.tensor and e.tensor > 1:
        yield Gap("experts.tensor", e.tensor, "needs expert parallelism, or must be the tensor degree")
    if s.stage_ranks // replicas(s) % (e.degree * e.tensor):
        yield Gap("experts.degree", e.degree, "does not divide the ranks that share one copy of the state")
    if e.shard * replicas(s) != s.expert_replicas:
        why = f"is not the {s.expert_replicas // replicas(s)} replicas of an expert in one copy of the state"
        yield Gap("experts.shard", e.shard, why)


def _state(s: Strategy) -> Iterator[Gap]:
    """Precision and tiers: fp32 masters, all on the device or all on the host."""
    p, name = s.precision, "TorchTitan"
    yield from only(("float32",), "precision.param", p.param, "with fp32 moments is not in TorchTitan")
    yield from only(("param",), "precision.master", p.master, f"is not in {name}: parameters are the master")
    yield from only(("bfloat16", "float32"), "precision.compute", p.compute, f"is not in {name}")
    yield from only(("float32",), "precision.reduce", p.reduce, f"is not in {name}: it reduces in fp32")
    yield from only(("float32",), "precision.moments", p.moments, f"is not in {name}")
    yield from only(("compute", p.compute, *MATMUL), "precision.matmul", p.matmul, f"is not in {name}")
    if s.optimizer.host_fraction != 1 and s.optimizer.state_tier == "host":
        yield Gap("optimizer.host_fraction", s.optimizer.host_fraction, f"is not in {name}: all or nothing")
    tiers = (s.dense.param_tier, s.dense.grad_tier, s.experts.param_tier, s.experts.grad_tier)
    if any(tier != s.optimizer.state_tier for tier in tiers):
        why = f"with state on the {s.optimizer.state_tier} is not in {name}: it offloads all or nothing"
        yield Gap("dense.param_tier", s.dense.param_tier, why)


def sections(plan: Plan) -> dict[str, dict[str, Any]]:
    """Sections and keys of the JobConfig."""
    s, t = plan.strategy, plan.training
    pipelined = s.pipeline.degree > 1
    local = t.global_batch // s.data_groups if pipelined else s.micro_batch
    model, flavor = MODELS.get(plan.model.name, ("", ""))
    found: dict[str, dict[str, Any]] = {
        "job": {"description": f"{plan.model.name}: {s.name}"},
        "model": {"name": model, "flavor": flavor},
        "optimizer": {
            "name": "AdamW",
            "lr": t.learning_rate,
            "beta1": t.beta1,
            "beta2": t.beta2,
            "eps": t.eps,
            "weight_decay": t.weight_decay,
        },
        "lr_scheduler": {"warmup_steps": t.warmup_steps},
        "training": {
            "local_batch_size": local,
            "global_batch_size": t.global_batch,
            "seq_len": t.seq_len,
            "max_norm": t.clip_norm,
            "enable_cpu_offload": s.dense.param_tier == "host",
            "dtype": "float32",
            "mixed_precision_param": "float32" if s.precision.compute == "float32" else "bfloat16",
            "mixed_precision_reduce": "float32",
        },
        "parallelism": _parallelism(plan),
        "activation_checkpoint": {"mode": "none" if s.activations.recompute == "none" else "full"},
        "debug": {"seed": t.seed},
    }
    if not found["model"]["name"]:
        del found["model"]
    if s.precision.matmul in MATMUL:
        kind = MATMUL[s.precision.matmul]
        found.setdefault("model", {})["converters"] = [
            f"quantize.linear.{kind}",
            f"quantize.grouped_mm.{kind}",
        ]
        found[f"quantize.grouped_mm.{kind}"] = {"fqns": ["experts"]}
    return found


def _parallelism(plan: Plan) -> dict[str, Any]:
    s = plan.strategy
    found: dict[str, Any] = {
        "data_parallel_replicate_degree": replicas(s),
        "data_parallel_shard_degree": max(1, s.dense.shard // s.attention.sequence),
        "fsdp_reshard_after_forward": "always" if s.dense.reshard_after_forward else "never",
        "tensor_parallel_degree": s.dense.tensor,
        "disable_loss_parallel": s.vocabulary.loss != "vocab_parallel",
        "context_parallel_degree": s.attention.sequence,
        "context_parallel_rotate_method": ROTATE.get(s.attention.exchange, "allgather"),
        "expert_parallel_degree": s.experts.degree,
        "expert_tensor_parallel_degree": s.experts.tensor,
        "expert_parallel_comm_backend": "deepep" if s.experts.dispatch == "deduplicated" else "standard",
        "pipeline_parallel_degree": s.pipeline.degree,
    }
    if s.pipeline.degree > 1:
        parts = s.pipeline.degree * s.pipeline.virtual_stages
        found |= {
            "pipeline_parallel_schedule": SCHEDULES[s.pipeline.schedule],
            "pipeline_parallel_microbatch_size": s.micro_batch,
            "pipeline_parallel_layers_per_stage": ceil_div(plan.model.num_hidden_layers, parts),
            "pipeline_parallel_first_stage_less_layers": 0,
            "pipeline_parallel_last_stage_less_layers": 0,
        }
    return found


def render(plan: Plan, left_out: list[Gap]) -> str:
    """The TOML text."""
    lines = [f"# {line}" for line in header("TorchTitan", CHECKED, plan, left_out)]
    lines.append("# To be set: model.hf_assets_path, training.dataset, training.steps")
    for name, section in sections(plan).items():
        lines += ["", f"[{name}]", *_keys(section)]
    return "\n".join(lines) + "\n"


def _keys(section: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_toml(value)}" for key, value in section.items()]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


TORCHTITAN = Target("torchtitan", CHECKED, gaps, render)
