"""TorchTitan v0.2.2, its last release: a TOML file of its JobConfig (torchtitan_main: what came after)."""

import json
from collections.abc import Sequence
from typing import Any

from mopsim.common.errors import SpecError
from mopsim.export.target import Target, header, unsaid
from mopsim.spec.capability import SIDES, Job, holds
from mopsim.spec.layout import ceil_div
from mopsim.spec.plan import Plan
from mopsim.spec.strategy import Activations

CHECKED = "torchtitan v0.2.2 (commit 73a0e69), torchtitan/config/job_config.py"

SCHEDULES = {"1f1b": "1F1B", "interleaved": "Interleaved1F1B", "zero_bubble": "InterleavedZeroBubble"}
ROTATE = {"all_gather": "allgather", "ring": "alltoall"}
BACKENDS = {"deepep": "deepep"}
NEVER = 1e12
"""A norm to clip to that no gradient has: TorchTitan always clips, and to 0 it would train nothing."""
MATMUL = {"fp8": "float8", "mxfp8": "mx"}


def sections(plan: Plan) -> dict[str, dict[str, Any]]:
    """Sections and keys of the JobConfig."""
    s, t = plan.strategy, plan.training
    pipelined = s.pipeline.pipeline_parallel > 1
    local = t.global_batch // s.data_groups if pipelined else s.micro_batch
    model, flavor = SIDES["torchtitan"]["flavors"].get(plan.model.name, ("", ""))
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
            "max_norm": t.clip_norm or NEVER,
            "enable_cpu_offload": s.dense.param_tier == "host",
            "dtype": "float32",
            "mixed_precision_param": "float32" if s.precision.compute == "float32" else "bfloat16",
            "mixed_precision_reduce": "float32",
        },
        "parallelism": _parallelism(plan),
        "compile": {"enable": compiled(plan)},
        "activation_checkpoint": _checkpoints(s.activations),
        "debug": {"seed": t.seed},
    }
    if plan.model.num_moe_layers and t.routing == "forced":
        found["debug"]["moe_force_load_balance"] = True
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


def _checkpoints(activations: Activations) -> dict[str, Any]:
    """Its selective mode keeps a list of operators (distributed/activation_checkpoint.py, _apply_op_sac)."""
    if activations.save_ops:
        return {"mode": "selective", "selective_ac_option": "op"}
    return {"mode": "none" if activations.recompute == "none" else "full"}


def compiled(plan: Plan) -> bool:
    """Whether the plan asks for compiled layers, or is of TorchTitan's: kernels fused, and no module's Python
    called."""
    if plan.strategy.compile == "block":
        return True
    return plan.stack.kernels.norm == "fused" and not plan.stack.host.modules


def _parallelism(plan: Plan) -> dict[str, Any]:
    s = plan.strategy
    found: dict[str, Any] = {
        "data_parallel_replicate_degree": s.dense_copies,
        "data_parallel_shard_degree": max(1, s.dense.fsdp // s.attention.context_parallel),
        "fsdp_reshard_after_forward": "always" if s.dense.reshard_after_forward else "never",
        "tensor_parallel_degree": s.dense.tensor_parallel,
        "disable_loss_parallel": s.vocabulary.loss != "vocab_parallel",
        "context_parallel_degree": s.attention.context_parallel,
        "context_parallel_rotate_method": ROTATE.get(s.attention.cp_comm_type, "allgather"),
        "expert_parallel_degree": s.experts.expert_parallel,
        "expert_tensor_parallel_degree": s.experts.expert_tensor_parallel,
        "expert_parallel_comm_backend": BACKENDS.get(s.experts.token_dispatcher, "standard"),
        "pipeline_parallel_degree": s.pipeline.pipeline_parallel,
    }
    if s.pipeline.pipeline_parallel > 1:
        parts = s.pipeline.pipeline_parallel * s.pipeline.virtual_stages
        found |= {
            "pipeline_parallel_schedule": SCHEDULES[s.pipeline.schedule],
            "pipeline_parallel_microbatch_size": s.micro_batch,
            "pipeline_parallel_first_stage_less_layers": 0,
            "pipeline_parallel_last_stage_less_layers": 0,
        }
        if holds("cut_by_length")(Job(plan.model, s)):
            found["pipeline_parallel_layers_per_stage"] = ceil_div(plan.model.num_hidden_layers, parts)
    return found


def render(plan: Plan, left_out: Sequence[SpecError]) -> str:
    """The TOML text."""
    lines = [f"# {line}" for line in header("TorchTitan", CHECKED, plan, left_out, "torchtitan")]
    lines.append("# To be set: model.hf_assets_path, training.dataset, training.steps")
    for name, section in unsaid(sections(plan), left_out, "torchtitan").items():
        lines += ["", f"[{name}]"]  # values of these kinds are written in TOML as in JSON
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in section.items()]
    return "\n".join(lines) + "\n"


TORCHTITAN = Target("torchtitan", CHECKED, render)
