"""The rules of a Strategy, in order: (what must hold, the field, the rule where it does not)."""

from itertools import chain
from operator import attrgetter, ge
from typing import TYPE_CHECKING

from mopsim.common.errors import Rule, Rules
from mopsim.common.units import LARGEST
from mopsim.common.working import near_divisors
from mopsim.spec.categories import COMPONENTS, JOINED, KEPT, MODULES
from mopsim.spec.model import ModelSpec

if TYPE_CHECKING:
    from mopsim.spec.strategy import Strategy

LEAST = {
    "world_size": 1, "micro_batch": 1, "pipeline.pipeline_parallel": 1, "pipeline.virtual_stages": 1,
    "dense.tensor_parallel": 1, "dense.fsdp": 1, "dense.prefetch": 0, "dense.chunk_tokens": 0,
    "attention.context_parallel": 1, "experts.expert_parallel": 1, "experts.expert_tensor_parallel": 1,
    "experts.expert_fsdp": 1, "experts.chunk_tokens": 0, "experts.max_chunks": 1, "experts.min_rows": 1,
    "vocabulary.vocab_parallel": 1, "vocabulary.chunk_tokens": 0, "optimizer.bucket_params": 1,
    "optimizer.slots": 1, "activations.host_budget": 0, "activations.cpu_offload_layers": 0,
    "activations.recompute_num_layers": 0,
    "precision.num_layers_at_start_in_bf16": 0, "precision.num_layers_at_end_in_bf16": 0,
}  # fmt: skip
"""Integers of a strategy, and the least that each may be."""
BETWEEN = {"optimizer.host_fraction": (0, 1), "experts.capacity": (1, 10**6), "experts.threshold": (1, 10**6)}
"""Ratios of a strategy, and between which two values each lies."""
WORDS = {"activations.modules": (*MODULES, *COMPONENTS), "activations.save_ops": KEPT}
"""Lists of names of a strategy, and the names that each may have."""
_VALUES, _RATIOS = attrgetter(*LEAST), attrgetter(*BETWEEN)


def own(s: "Strategy") -> Rules:
    """Rules of a strategy alone."""
    return chain(_ranges(s), _degrees(s), _state(s), _activations(s), _pipeline(s), _precision(s))


def _ranges(s: "Strategy") -> Rules:
    """None of them where all hold: a search makes thousands of strategies."""
    values = _VALUES(s)
    between = all(
        low <= ratio <= high for (low, high), ratio in zip(BETWEEN.values(), _RATIOS(s), strict=True)
    )
    if between and max(values) <= LARGEST and all(map(ge, values, LEAST.values())):
        return
    for (field, least), value in zip(LEAST.items(), values, strict=True):
        yield value >= least, field, f"must be at least {least}"
        yield value <= LARGEST, field, "must be at most 2^62"
    for (field, (low, high)), ratio in zip(BETWEEN.items(), _RATIOS(s), strict=True):
        yield low <= ratio <= high, field, f"must lie between {low} and {high:,}"


def _degrees(s: "Strategy") -> Rules:
    """Each degree divides what it is a view of."""
    degree, world = s.pipeline.pipeline_parallel, f"world_size {s.world_size}"
    yield _divides(s.world_size, degree, "pipeline.pipeline_parallel", world)
    ranks = s.stage_ranks
    stage = f"the {ranks} ranks of a stage"
    for field, degree in (
        ("dense.tensor_parallel", s.dense.tensor_parallel),
        ("dense.fsdp", s.dense.fsdp),
        ("attention.context_parallel", s.attention.context_parallel),
        ("experts.expert_parallel", s.experts.expert_parallel),
        ("vocabulary.vocab_parallel", s.vocabulary.vocab_parallel),
    ):
        yield _divides(ranks, degree, field, stage)
    split = s.experts.expert_parallel * s.experts.expert_tensor_parallel
    rule = f"times experts.expert_parallel {s.experts.expert_parallel} does not divide {stage}"
    yield ranks % split == 0, "experts.expert_tensor_parallel", rule
    replicas = f"the {s.expert_replicas} replicas of an expert"
    yield _divides(s.expert_replicas, s.experts.expert_fsdp, "experts.expert_fsdp", replicas)
    split = s.dense.tensor_parallel * s.attention.context_parallel
    rule = f"times dense.tensor_parallel {s.dense.tensor_parallel} does not divide {stage}"
    yield ranks % split == 0, "attention.context_parallel", rule


def _divides(total: int, degree: int, field: str, what: str) -> Rule:
    """The rule that `degree` divides `total`, which is `what`; broken, it names the nearest that do."""
    fits = total % degree == 0
    return fits, field, f"does not divide {what}{'' if fits else near_divisors(total, degree)}"


def _state(s: "Strategy") -> Rules:
    """The loss has what it splits by; the optimizer's update has its state at hand."""
    loss, degree = s.vocabulary.loss, s.vocabulary.vocab_parallel
    whole = f"does not split the vocabulary, but vocabulary.vocab_parallel is {degree}"
    yield degree == 1 or loss in ("ring", "vocab_parallel"), "vocabulary.loss", whole
    chunked = loss == "chunked"
    least = "must be at least 1 for a chunked loss"
    yield not chunked or s.vocabulary.chunk_tokens >= 1, "vocabulary.chunk_tokens", least
    on_host, update = s.optimizer.state_tier == "host", s.optimizer.update_on
    yield update == "device" or on_host, "optimizer.update_on", "needs optimizer.state_tier host"
    streamed = on_host and update == "device" and s.optimizer.host_fraction == 1
    rule = "needs all of the state streamed: optimizer.state_tier host, update_on device, host_fraction 1"
    yield s.optimizer.overlap != "next_forward" or streamed, "optimizer.overlap", rule
    here = update == s.dense.grad_tier == s.experts.grad_tier == "device"
    alike = not on_host or s.optimizer.host_fraction == 1
    rule = "needs gradients and optimizer.update_on on the device, and the state in one tier: host_fraction 1"
    yield s.optimizer.overlap != "backward" or (here and alike), "optimizer.overlap", rule


def _activations(s: "Strategy") -> Rules:
    a = s.activations
    for field, names in (("activations.modules", a.modules), ("activations.save_ops", a.save_ops)):
        for name in names:
            yield name in WORDS[field], field, f"names {name!r}, not one of {', '.join(WORDS[field])}"
            yield names.count(name) == 1, field, f"names {name!r} twice"
    full = f"needs activations.recompute full, not {a.recompute}"
    yield not a.save_ops or a.recompute == "full", "activations.save_ops", full
    yield not a.recompute_num_layers or a.recompute == "full", "activations.recompute_num_layers", full
    for needed, given in (
        ("activations.recompute none", a.recompute == "none"),
        ("activations.layer_inputs device", a.layer_inputs == "device"),
        ("pipeline.pipeline_parallel 1", s.pipeline.pipeline_parallel == 1),
    ):
        yield not a.cpu_offload_layers or given, "activations.cpu_offload_layers", f"needs {needed}"
    for parts in JOINED.values() if s.dense.tensor_parallel > 1 else ():
        rule = f"needs all of {', '.join(parts)}, or none: they are one product where tensors are split"
        yield len({*parts} & {*a.save_ops}) in (0, len(parts)), "activations.save_ops", rule


def _pipeline(s: "Strategy") -> Rules:
    p = s.pipeline
    virtual = p.virtual_stages > 1
    alone = "needs a pipeline.pipeline_parallel above 1"
    yield not virtual or p.pipeline_parallel > 1 or p.folded, "pipeline.virtual_stages", alone
    one_part = f"plays one part a stage, not pipeline.virtual_stages {p.virtual_stages}: needs interleaved"
    yield not virtual or p.schedule == "interleaved" or p.folded, "pipeline.schedule", one_part
    yield not p.folded or p.virtual_stages == 2, "pipeline.virtual_stages", "must be 2 with dualpipe_v"
    parts = p.pipeline_parallel * p.virtual_stages
    listed = f"must be a count of layers, 0 or more, for each of the {parts} parts"
    yield len(p.layers) in (0, parts) and min(p.layers, default=0) >= 0, "pipeline.layers", listed
    between = "needs pipeline.virtual_stages above 1 in a pipeline"
    yield not s.overlap.experts or p.pipeline_parallel == 1 or virtual, "overlap.experts", between


def _precision(s: "Strategy") -> Rules:
    """Layers in bf16 are an exception from a recipe."""
    p = s.precision
    recipe = p.compute == "bfloat16" and p.is_cast
    rule = "needs precision.compute bfloat16 and a recipe in precision.matmul"
    for place in ("start", "end"):
        field = f"num_layers_at_{place}_in_bf16"
        yield recipe or not getattr(p, field), f"precision.{field}", rule


def with_model(s: "Strategy", model: ModelSpec) -> Rules:
    experts, heads, layers = model.num_local_experts, model.num_attention_heads, model.num_hidden_layers
    field, degree = "experts.expert_parallel", s.experts.expert_parallel
    if experts:
        yield _divides(experts, degree, field, f"num_local_experts {experts}")
    else:
        yield degree == 1, field, "must be 1 for a model without experts"
    tensor = s.dense.tensor_parallel
    if s.attention.cp_comm_type == "ulysses":
        rule = f"times dense.tensor_parallel {tensor} does not divide num_attention_heads {heads}"
        yield heads % (s.attention.context_parallel * tensor) == 0, "attention.context_parallel", rule
    states, degree = model.linear_attention.num_value_heads, s.attention.context_parallel
    rule = f"times attention.context_parallel {degree} does not divide linear_attention.num_value_heads "
    yield states % (degree * tensor) == 0, "dense.tensor_parallel", f"{rule}{states}"
    keys = model.linear_attention.num_key_heads
    rule = f"does not divide linear_attention.num_key_heads {keys}"
    yield keys % tensor == 0, "dense.tensor_parallel", rule
    whole = s.dense.sequence_parallel or tensor == 1
    rows = "must be true where experts.expert_tensor_parallel is above 1: its ranks gather rows"
    yield whole or s.experts.expert_tensor_parallel == 1, "dense.sequence_parallel", rows
    yield _divides(heads, tensor, "dense.tensor_parallel", f"num_attention_heads {heads}")
    away = s.activations.cpu_offload_layers
    more = f"is more than num_hidden_layers {layers}"
    yield away <= layers, "activations.cpu_offload_layers", more
    field, chunk = "activations.recompute_num_layers", s.pipeline.largest_chunk(layers)
    rule = f"is more than the {chunk} layers of a model chunk; 0 recomputes all"
    yield s.activations.recompute_num_layers <= chunk, field, rule
    start, end = s.precision.num_layers_at_start_in_bf16, s.precision.num_layers_at_end_in_bf16
    field = f"precision.num_layers_at_{'start' if start > layers else 'end'}_in_bf16"
    rule = f"makes {start + end} layers in bf16, of num_hidden_layers {layers}"
    yield start + end <= layers, field, rule
    stages, listed = s.pipeline.pipeline_parallel * s.pipeline.virtual_stages, s.pipeline.layers
    rule = f"is {sum(listed)} layers, not the num_hidden_layers {layers}"
    yield not listed or sum(listed) == layers, "pipeline.layers", rule
    rule = f"times virtual_stages {s.pipeline.virtual_stages} is more than num_hidden_layers {layers}"
    yield bool(listed) or stages <= layers, "pipeline.pipeline_parallel", rule
    if listed or stages <= layers:
        parts = s.pipeline.parts(layers)
        grouped = model.whole_groups(parts)
        will_do = f"{list(grouped)} will do" if all(grouped[:-1]) else f"too many parts: {stages}"
        rule = f"lets a part begin with a layer that attends to what one before it chose; {will_do}"
        yield grouped == parts, "pipeline.layers", rule
