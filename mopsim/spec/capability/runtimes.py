"""Relations between fields that a runtime of mopexec needs. One small function each."""

from collections.abc import Iterator
from typing import Any

from mopsim.common.errors import SpecError
from mopsim.spec.capability.facts import DOES, Job, Side, has_experts
from mopsim.spec.layout import interval


def unless(holds: bool, job: Job, field: str, rule: str) -> Iterator[SpecError]:
    """The error of `strategy.field` unless the relation holds."""
    if not holds:
        value: Any = job.strategy
        for step in field.split("."):
            value = getattr(value, step)
        yield SpecError(f"strategy.{field}", value, rule)


# flat_units and fully_shard


def heads_over_ranks(job: Job, side: Side) -> Iterator[SpecError]:
    """Ulysses gives each rank whole key and value heads, or each head whole ranks."""
    degree, model = job.strategy.attention.context_parallel, job.model
    name = "num_attention_heads" if model.attention == "mla" else "num_key_value_heads"
    heads = max(1, getattr(model, name) // job.strategy.dense.tensor_parallel)
    holds = heads % degree == 0 or degree % heads == 0 or job.strategy.attention.cp_comm_type != "ulysses"
    rule = f"and {name} {heads}: neither divides the other"
    yield from unless(holds, job, "attention.context_parallel", rule)


def ring_has_rows(job: Job, side: Side) -> Iterator[SpecError]:
    """Every rank of the vocabulary ring holds rows."""
    vocabulary, rows = job.strategy.vocabulary, job.model.vocab_size
    start, stop = interval(rows, vocabulary.vocab_parallel, vocabulary.vocab_parallel - 1)
    rule = f"leaves the last rank no rows of vocab_size {rows}"
    yield from unless(vocabulary.loss != "ring" or start < stop, job, "vocabulary.vocab_parallel", rule)


def host_updates_masters(job: Job, side: Side) -> Iterator[SpecError]:
    holds = job.strategy.optimizer.update_on == "device" or job.strategy.precision.master != "param"
    rule = "leaves no master weights on the host, where optimizer.update_on is host"
    yield from unless(holds, job, "precision.master", rule)


def gradients_no_wider(job: Job, side: Side) -> Iterator[SpecError]:
    """The norm and the update work in the masters' dtype, or fp32 where that is wider."""
    precision = job.strategy.precision
    masters = precision.param if precision.master == "param" else precision.master
    rule = f"is not {DOES[side]}, only with masters (precision.master) in float64"
    yield from unless(precision.grad != "float64" or masters == "float64", job, "precision.grad", rule)


def products_in_compute(job: Job, side: Side) -> Iterator[SpecError]:
    """No recipe casts operands: products run in the compute dtype."""
    matmul, compute = job.strategy.precision.matmul, job.strategy.precision.compute
    rule = f"is not {DOES[side]}, only 'compute' or precision.compute {compute!r}"
    yield from unless(matmul in ("compute", compute), job, "precision.matmul", rule)


def one_state_dtype(job: Job, side: Side) -> Iterator[SpecError]:
    """torch's optimizer works in the dtype of the FSDP2 shards."""
    precision = job.strategy.precision
    for field in ("grad", "moments", "master"):
        usual = ("param", precision.param) if field == "master" else (precision.param,)
        rule = f"is not {DOES[side]}, only precision.param {precision.param!r}"
        yield from unless(getattr(precision, field) in usual, job, f"precision.{field}", rule)


def offloads_together(job: Job, side: Side) -> Iterator[SpecError]:
    """FSDP2's CPUOffloadPolicy moves parameters, gradients and state together, and the host updates them."""
    strategy, tier = job.strategy, job.strategy.optimizer.state_tier
    if not job.fsdp:
        return
    rule = f"is not {DOES[side]}, only optimizer.state_tier {tier!r}: fully_shard offloads all or nothing"
    yield from unless(strategy.optimizer.update_on == tier, job, "optimizer.update_on", rule)
    for part in ("dense", "experts") if has_experts(job) else ("dense",):
        for field in ("param_tier", "grad_tier"):
            yield from unless(getattr(getattr(strategy, part), field) == tier, job, f"{part}.{field}", rule)


def boundaries_need_recompute(job: Job, side: Side) -> Iterator[SpecError]:
    activations = job.strategy.activations
    holds = activations.layer_inputs == "device" or activations.recompute == "full"
    rule = f"is not {DOES[side]}, only with activations.recompute 'full'"
    yield from unless(holds, job, "activations.layer_inputs", rule)


# split_modules


def split_heads(job: Job, side: Side) -> Iterator[SpecError]:
    """Every tensor-parallel rank has whole heads, and whole key and value heads of its own."""
    tensor, model = job.strategy.dense.tensor_parallel, job.model
    if tensor == 1:
        return
    heads = model.num_attention_heads if model.attention == "mla" else model.num_key_value_heads
    rule = f"does not divide num_key_value_heads {heads}, as split_modules needs"
    yield from unless(heads % tensor == 0, job, "dense.tensor_parallel", rule)
    if model.attention == "gqa" and model.qk_norm == "full":
        rule = "is not run by split_modules where dense.tensor_parallel is above 1, only 'none' or 'head'"
        yield SpecError("model.qk_norm", model.qk_norm, rule)
    contiguous = job.strategy.attention.rank_placement == "contiguous"
    rule = "is not run by split_modules where dense.tensor_parallel is above 1, only 'contiguous'"
    yield from unless(contiguous, job, "attention.rank_placement", rule)


def split_head(job: Job, side: Side) -> Iterator[SpecError]:
    """The ranks that split tensors split the vocabulary too, each some rows of it."""
    tensor, vocabulary = job.strategy.dense.tensor_parallel, job.strategy.vocabulary
    rule = f"is not {DOES[side]} under tensor parallelism, only 'vocab_parallel'"
    yield from unless(tensor == 1 or vocabulary.loss == "vocab_parallel", job, "vocabulary.loss", rule)
    start, stop = interval(job.model.vocab_size, tensor, tensor - 1)
    rule = f"leaves the last rank no rows of vocab_size {job.model.vocab_size}"
    yield from unless(start < stop, job, "dense.tensor_parallel", rule)


def blocks_of_keys(job: Job, side: Side) -> Iterator[SpecError]:
    """Where blocks of keys are merged, each is attended whole but a rank's own."""
    attention = job.strategy.attention
    if attention.context_parallel == 1 or attention.cp_comm_type == "ulysses":
        return
    where = f"is not {DOES[side]} where attention.cp_comm_type is {attention.cp_comm_type!r}"
    for field, usual in (("sliding_window", 0), ("attention_sinks", False)):
        value = getattr(job.model, field)
        if value != usual:
            yield SpecError(f"model.{field}", value, f"{where}, only {usual!r}")
    mask = "causal" if job.training is None else job.training.attention_mask
    if mask != "causal":
        yield SpecError("training.attention_mask", mask, f"{where}, only 'causal'")


def stages_alone(job: Job, side: Side) -> Iterator[SpecError]:
    """No stage needs what another has."""
    if job.strategy.pipeline.pipeline_parallel == 1:
        return
    where = "where pipeline.pipeline_parallel is above 1"
    for field, usual in (("tie_word_embeddings", False), ("num_nextn_predict_layers", 0)):
        value = getattr(job.model, field)
        if value != usual:
            yield SpecError(f"model.{field}", value, f"is not {DOES[side]} {where}, only {usual!r}")
    budget = job.strategy.activations.host_budget
    yield from unless(not budget, job, "activations.host_budget", f"is not {DOES[side]} {where}, only 0")


def modules_again(job: Job, side: Side) -> Iterator[SpecError]:
    """Modules that a checkpoint can stand around."""
    activations, known = job.strategy.activations, ("core_attn", "mlp", "moe")
    rule = f"is not {DOES[side]}, only of {', '.join(known)}"
    again = activations.recompute == "selective"
    yield from unless(not again or set(activations.modules) <= set(known), job, "activations.modules", rule)


def split_experts(job: Job, side: Side) -> Iterator[SpecError]:
    """A bias of what several ranks make parts of would be added by each."""
    if has_experts(job) and job.model.expert_bias:
        split = job.strategy.experts.expert_tensor_parallel
        rule = f"is not {DOES[side]} for experts with biases, only 1"
        yield from unless(split == 1, job, "experts.expert_tensor_parallel", rule)


def shards_of_a_slice(job: Job, side: Side) -> Iterator[SpecError]:
    strategy = job.strategy
    holders = strategy.stage_ranks // strategy.dense.tensor_parallel
    rule = f"does not divide the {holders} ranks that hold the same slice of a tensor"
    yield from unless(holders % strategy.dense.fsdp == 0, job, "dense.fsdp", rule)


def updates_where_state_is(job: Job, side: Side) -> Iterator[SpecError]:
    optimizer = job.strategy.optimizer
    rule = f"is not {DOES[side]}, only optimizer.state_tier {optimizer.state_tier!r}"
    yield from unless(optimizer.update_on == optimizer.state_tier, job, "optimizer.update_on", rule)


def state_of_main_gradients(job: Job, side: Side) -> Iterator[SpecError]:
    """Products run on the parameters as they are; gradients, masters and moments have one dtype."""
    p = job.strategy.precision
    masters = p.param if p.master == "param" else p.master
    for field, wanted, of in (
        ("param", p.compute, "precision.compute"),
        ("reduce", p.grad, "precision.grad"),
        ("grad", masters, "that of the masters"),
        ("moments", masters, "that of the masters"),
    ):
        rule = f"is not {DOES[side]}, only {wanted!r}, {of}"
        yield from unless(getattr(p, field) == wanted, job, f"precision.{field}", rule)
