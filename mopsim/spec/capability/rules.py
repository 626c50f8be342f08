"""Relations between fields that a side needs beyond what each field's row says. One small function each."""

from collections.abc import Callable, Iterator
from typing import Any

from msgspec import Struct, structs

from mopsim.common.errors import SpecError
from mopsim.spec.capability.facts import (
    DOES,
    Job,
    Side,
    expert_parallel,
    has_experts,
    slices,
    whole_steps,
)
from mopsim.spec.capability.runtimes import (
    blocks_of_keys,
    boundaries_need_recompute,
    gradients_no_wider,
    heads_over_ranks,
    host_updates_masters,
    modules_again,
    offloads_together,
    one_state_dtype,
    products_in_compute,
    ring_has_rows,
    shards_of_a_slice,
    split_experts,
    split_head,
    split_heads,
    stages_alone,
    state_of_main_gradients,
    unless,
    updates_where_state_is,
)
from mopsim.spec.capability.software import software_is_the_runtimes, updates_beside_gathers
from mopsim.spec.categories import MODULES
from mopsim.spec.presets import list_models, load_model

Rule = Callable[[Job, Side], Iterator[SpecError]]

AUTO_EP = {
    "mixtral": "mixtral",
    "qwen3": "qwen3_moe",
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
}
"""DeepSpeed's AutoEP presets, by the beginning of the model's name."""


def auto_ep(name: str) -> str | None:
    """AutoEP's preset of a network, if it has one."""
    return next((preset for start, preset in AUTO_EP.items() if name.startswith(start)), None)


# the simulator


def tensor_group_holds_vocabulary(job: Job, side: Side) -> Iterator[SpecError]:
    """`vocab_parallel` splits the head over the tensor group."""
    strategy = job.strategy
    holds = (
        strategy.vocabulary.loss != "vocab_parallel"
        or strategy.vocabulary.vocab_parallel == strategy.dense.tensor_parallel
    )
    rule = (
        f"is not {DOES[side]} for vocab_parallel, only dense.tensor_parallel {strategy.dense.tensor_parallel}"
    )
    yield from unless(holds, job, "vocabulary.vocab_parallel", rule)


def experts_overlap_below_zero_3(job: Job, side: Side) -> Iterator[SpecError]:
    """Exchanges of one microbatch run beside another where layers need no gathers in between."""
    holds = not job.strategy.overlap.experts or not expert_parallel(job) or whole_steps(job)
    rule = (
        "is not simulated where parameters are gathered layer by layer (dense.zero 3), only False: a layer's "
    )
    rule += "gathers would wait for the other microbatch's"
    yield from unless(holds, job, "overlap.experts", rule)


def ring_has_rows_of_its_own(job: Job, side: Side) -> Iterator[SpecError]:
    """Every rank of a vocabulary ring has other tokens."""
    dense = job.strategy.dense
    holds = job.strategy.vocabulary.loss != "ring" or dense.tensor_parallel == 1 or dense.sequence_parallel
    rule = "is not simulated under tensor parallelism without dense.sequence_parallel: ranks have equal rows"
    yield from unless(holds, job, "vocabulary.loss", rule)


def slices_of_whole_rows(job: Job, side: Side) -> Iterator[SpecError]:
    """A slice of the FFN's rows passes all of its columns."""
    holds = not slices(job) or job.strategy.dense.tensor_parallel == 1
    rule = (
        f"needs dense.tensor_parallel 1, not {job.strategy.dense.tensor_parallel}: slices are not exchanged"
    )
    yield from unless(holds, job, "dense.chunk_tokens", rule)


def kept_scores_see_whole_sequences(job: Job, side: Side) -> Iterator[SpecError]:
    """Blocks of keys and values are merged by the sums that flash kernels keep."""
    stack, attention = job.software, job.strategy.attention
    if not stack.flash and attention.cp_comm_type != "ulysses" and attention.context_parallel > 1:
        rule = f"keeps scores, which no program does where attention.cp_comm_type is {attention.cp_comm_type}"
        yield SpecError("stack.kernels.attention", stack.kernels.attention, rule)


def plain_latents(job: Job, side: Side) -> Iterator[SpecError]:
    """Latent attention is simulated without what only grouped queries have."""
    if job.model.attention == "mla":
        usual = {"attention_bias": "none", "attention_sinks": False, "qk_norm": "none", "sliding_window": 0}
        for field, value in usual.items():
            if getattr(job.model, field) != value:
                rule = f"is not simulated with attention 'mla', only {value!r}"
                yield SpecError(f"model.{field}", getattr(job.model, field), rule)


# exports


def flavor_is_the_preset(job: Job, side: Side) -> Iterator[SpecError]:
    """A flavor of TorchTitan is one network: that of the preset with this name."""
    if job.model.name not in list_models():
        return
    preset = load_model(job.model.name)
    flavors = dict(_values(preset))
    for path, value in _values(job.model):
        flavor = flavors[path]
        if value != flavor and path not in ("total_params", "active_params", "source", "assumptions"):
            rule = f"is not in TorchTitan's flavor of {preset.name}: {flavor!r}"
            yield SpecError(f"model.{path}", value, rule)


def _values(spec: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every field that holds no struct."""
    for field in structs.fields(spec):
        value = getattr(spec, field.name)
        if isinstance(value, Struct):
            yield from _values(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def stages_of_a_rank(job: Job, side: Side) -> Iterator[SpecError]:
    pipeline = job.strategy.pipeline
    holds = pipeline.pipeline_parallel == 1 or pipeline.virtual_stages > 1 or pipeline.schedule == "1f1b"
    rule = f"is not {DOES[side]} with pipeline.virtual_stages 1, only '1f1b': it needs two stages a rank"
    yield from unless(holds, job, "pipeline.schedule", rule)


def copies_of_the_state(job: Job, side: Side) -> int:
    """Replicas of the dense state (TorchTitan), or of Megatron's optimizer instance."""
    strategy = job.strategy
    if side == "megatron-bridge" and not strategy.dense.zero:
        return 1
    return max(1, strategy.stage_ranks // (strategy.dense.tensor_parallel * strategy.dense.fsdp))


def shards_divide(job: Job, side: Side) -> Iterator[SpecError]:
    s = job.strategy
    whole = s.stage_ranks % (s.dense.tensor_parallel * s.dense.fsdp) == 0
    if side == "torchtitan":
        rule = "is not context parallelism x a data-parallel degree, as TorchTitan shards"
        yield from unless(whole and s.dense.fsdp % s.attention.context_parallel == 0, job, "dense.fsdp", rule)
    else:
        rule = "does not divide the data-parallel ranks"
        yield from unless(whole or not s.dense.zero, job, "dense.fsdp", rule)


def experts_see_split_rows(job: Job, side: Side) -> Iterator[SpecError]:
    """Megatron-Core refuses to train experts under tensor parallelism without it (its TransformerConfig)."""
    dense = job.strategy.dense
    holds = dense.sequence_parallel or dense.tensor_parallel == 1 or not has_experts(job)
    rule = f"is not {DOES[side]} for a model with experts and dense.tensor_parallel above 1, only True"
    yield from unless(holds, job, "dense.sequence_parallel", rule)


def experts_share_the_copy(job: Job, side: Side) -> Iterator[SpecError]:
    """One setting shards experts and the other weights: all replicas of an expert within a copy."""
    s = job.strategy
    if (side == "megatron-bridge" and not s.dense.zero) or not has_experts(job):
        return
    copies = copies_of_the_state(job, side)
    rule = f"is not the {s.expert_replicas // copies} replicas of an expert in one copy of the state"
    yield from unless(s.experts.expert_fsdp * copies == s.expert_replicas, job, "experts.expert_fsdp", rule)


def titan_expert_ranks(job: Job, side: Side) -> Iterator[SpecError]:
    s, e = job.strategy, job.strategy.experts
    if e.expert_parallel > 1:
        rule = "is not in TorchTitan, only 1 or the tensor-parallel degree"
        yield from unless(
            e.expert_tensor_parallel in (1, s.dense.tensor_parallel),
            job,
            "experts.expert_tensor_parallel",
            rule,
        )
    else:
        rule = "is not in TorchTitan without expert parallelism, only the tensor-parallel degree"
        yield from unless(
            e.expert_tensor_parallel in (1, s.dense.tensor_parallel),
            job,
            "experts.expert_tensor_parallel",
            rule,
        )
    whole = (
        s.stage_ranks // copies_of_the_state(job, side) % (e.expert_parallel * e.expert_tensor_parallel) == 0
    )
    rule = "does not divide the ranks that share one copy of the state"
    yield from unless(whole, job, "experts.expert_parallel", rule)


def titan_offload(job: Job, side: Side) -> Iterator[SpecError]:
    s, tier = job.strategy, job.strategy.optimizer.state_tier
    for part in (s.dense, s.experts):
        for field in ("param_tier", "grad_tier"):
            name = f"{'dense' if part is s.dense else 'experts'}.{field}"
            rule = f"with state on the {tier} is not in TorchTitan: it offloads all or nothing"
            yield from unless(getattr(part, field) == tier, job, name, rule)


def titan_products(job: Job, side: Side) -> Iterator[SpecError]:
    precision = job.strategy.precision
    known = ("compute", precision.compute, "fp8", "mxfp8")
    rule = f"is not in TorchTitan, only {', '.join(map(repr, known))}"
    yield from unless(precision.matmul in known, job, "precision.matmul", rule)


def megatron_head(job: Job, side: Side) -> Iterator[SpecError]:
    s = job.strategy
    holds = s.vocabulary.loss != "full" or s.dense.tensor_parallel == 1
    rule = "is not in Megatron-Bridge under tensor parallelism, only 'vocab_parallel': it splits the head"
    yield from unless(holds, job, "vocabulary.loss", rule)


def megatron_fsdp(job: Job, side: Side) -> Iterator[SpecError]:
    s = job.strategy
    holds = s.dense.zero != 3 or s.pipeline.pipeline_parallel == 1
    yield from unless(
        holds, job, "pipeline.pipeline_parallel", "with ZeRO-3 is not in Megatron-Bridge, only 1"
    )


def megatron_modules(job: Job, side: Side) -> Iterator[SpecError]:
    activations = job.strategy.activations
    known = activations.recompute != "selective" or set(activations.modules) <= set(MODULES)
    rule = f"is not in Megatron-Bridge, only of {', '.join(MODULES)}"
    yield from unless(known, job, "activations.modules", rule)


def megatron_boundaries(job: Job, side: Side) -> Iterator[SpecError]:
    activations = job.strategy.activations
    holds = activations.layer_inputs == "device" or activations.recompute != "full"
    rule = "with full recomputation is not in Megatron-Bridge: it offloads what it does not recompute"
    yield from unless(holds, job, "activations.layer_inputs", rule)


def megatron_gradients(job: Job, side: Side) -> Iterator[SpecError]:
    precision = job.strategy.precision
    rule = f"differs from precision.grad {precision.grad!r}: Megatron-Bridge has one dtype for both"
    yield from unless(precision.reduce == precision.grad, job, "precision.reduce", rule)


def deepspeed_degrees(job: Job, side: Side) -> Iterator[SpecError]:
    s = job.strategy
    rule = "with sequence parallelism is not in DeepSpeed, only 1"
    yield from unless(
        s.dense.tensor_parallel == 1 or s.attention.context_parallel == 1, job, "dense.tensor_parallel", rule
    )
    every = s.dense.fsdp == s.stage_ranks // s.dense.tensor_parallel
    rule = "is not all ranks: DeepSpeed shards over fewer only with ZeRO-3 (MiCS)"
    yield from unless(every or s.dense.zero not in (1, 2), job, "dense.fsdp", rule)


def deepspeed_experts(job: Job, side: Side) -> Iterator[SpecError]:
    s, e = job.strategy, job.strategy.experts
    if has_experts(job) and s.dense.zero:
        rule = f"is not the {s.expert_replicas} replicas of an expert, as DeepSpeed shards"
        yield from unless(e.expert_fsdp == s.expert_replicas, job, "experts.expert_fsdp", rule)
    if not expert_parallel(job):
        return
    rule = f"needs a preset of AutoEP, and {job.model.name} has none"
    yield from unless(auto_ep(job.model.name) is not None, job, "experts.expert_parallel", rule)
    rule = "beside AutoEP and ZeRO-3 is not in DeepSpeed"
    whole = s.dense.zero != 3
    yield from unless(s.dense.tensor_parallel == 1, job, "dense.tensor_parallel", rule)
    yield from unless(s.attention.context_parallel == 1 or whole, job, "attention.context_parallel", rule)
    yield from unless(s.dense.fsdp == s.stage_ranks or whole, job, "dense.fsdp", rule)


def deepspeed_dtypes(job: Job, side: Side) -> Iterator[SpecError]:
    p = job.strategy.precision
    rule = f"is not in DeepSpeed, only precision.compute {p.compute!r}"
    yield from unless(p.param == p.compute, job, "precision.param", rule)
    rule = "is not in DeepSpeed, only 'float32' unless parameters are fp32: it keeps fp32 masters"
    yield from unless(p.master != "param" or p.param == "float32", job, "precision.master", rule)
    yield from products_in_compute(job, side)


def deepspeed_offload(job: Job, side: Side) -> Iterator[SpecError]:
    s = job.strategy
    for field in ("param_tier", "grad_tier"):
        rule = f"differs from dense.{field}: not in DeepSpeed"
        same = getattr(s.dense, field) == getattr(s.experts, field)
        yield from unless(same or not has_experts(job), job, f"experts.{field}", rule)
    boundary = s.activations.layer_inputs == "device" or s.activations.recompute != "none"
    rule = "is not in DeepSpeed without activations.recompute (cpu_checkpointing)"
    yield from unless(boundary, job, "activations.layer_inputs", rule)
    three = s.dense.zero == 3
    rule = "is not in DeepSpeed without ZeRO-3"
    yield from unless(s.dense.param_tier == "device" or three, job, "dense.param_tier", rule)
    partly = s.optimizer.state_tier == "host" and s.optimizer.host_fraction != 1
    yield from unless(not partly or three, job, "optimizer.host_fraction", rule)
    grads = s.dense.grad_tier == "device" or s.optimizer.update_on == "host"
    rule = "is not in DeepSpeed without optimizer.update_on 'host'"
    yield from unless(grads, job, "dense.grad_tier", rule)
    state = s.optimizer.state_tier == "device" or s.dense.zero > 0
    yield from unless(state, job, "optimizer.state_tier", "is not in DeepSpeed without ZeRO")


RULES: dict[Side, tuple[Rule, ...]] = {
    "simulator": (
        tensor_group_holds_vocabulary, offloads_together, plain_latents, experts_overlap_below_zero_3,
        kept_scores_see_whole_sequences, slices_of_whole_rows, ring_has_rows_of_its_own,
        updates_beside_gathers,
    ),
    "flat_units": (
        software_is_the_runtimes, heads_over_ranks, ring_has_rows, host_updates_masters, gradients_no_wider,
        products_in_compute,
    ),
    "fully_shard": (
        software_is_the_runtimes, heads_over_ranks, products_in_compute, one_state_dtype, offloads_together,
        boundaries_need_recompute,
    ),
    "split_modules": (
        software_is_the_runtimes, split_heads, split_head, blocks_of_keys, heads_over_ranks,
        tensor_group_holds_vocabulary, split_experts, stages_alone, modules_again, shards_of_a_slice,
        updates_where_state_is, products_in_compute, state_of_main_gradients, boundaries_need_recompute,
    ),
    "torchtitan": (
        flavor_is_the_preset, stages_of_a_rank, shards_divide, titan_expert_ranks, experts_share_the_copy,
        tensor_group_holds_vocabulary, titan_offload, titan_products,
    ),
    "megatron-bridge": (
        megatron_head, tensor_group_holds_vocabulary, shards_divide, experts_share_the_copy, megatron_fsdp,
        megatron_modules, megatron_boundaries, megatron_gradients, experts_see_split_rows,
    ),
    "deepspeed": (deepspeed_degrees, deepspeed_experts, deepspeed_dtypes, deepspeed_offload),
}  # fmt: skip
