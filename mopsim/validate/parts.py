"""Components that are parts of a step: lowered as such and played by the engine."""

from msgspec.structs import replace

from mopsim.common.units import UNITS
from mopsim.engine import SimResult, run, simulate
from mopsim.program.fragment import expert_layer
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.layout import ceil_div, offloaded_boundaries
from mopsim.spec.model import ModelSpec
from mopsim.spec.presets import load_model
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Experts, Strategy
from mopsim.spec.tensors import tensors
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, mop
from mopsim.validate.component import Component
from mopsim.validate.tables import UnsupportedError

GIB = UNITS["GiB"]
HELD = ("boundaries_offloaded", "host_payload_gib_per_rank", "host_pinned_gib_per_rank")
"""What a budget of the host holds."""
UNSTATED = ("peak_memory_gib", "node_host_memory_gib")
"""Memory that other programs have a part of."""
LIBRARIES = 2 * 32 * 2**20
"""Workspaces that torch gives cuBLAS and cuBLASLt on Hopper, 32 MiB each
(torch/csrc: CUBLAS_WORKSPACE_CONFIG, CUBLASLT_WORKSPACE_SIZE); the allocator counts them."""


def _step(
    component: Component, model: ModelSpec, strategy: Strategy, seq: int, hardware: HardwareProfile
) -> SimResult:
    routing = str(component.params.get("routing", "balanced"))
    training = TrainSpec(
        seq_len=seq, global_batch=strategy.data_groups * strategy.micro_batch, routing=routing
    )
    nodes = -(-strategy.world_size // hardware.devices_per_node)
    return simulate(model, hardware, nodes, strategy, training, timeline=True)


def _seconds(result: SimResult, component: str, phases: tuple[str, ...]) -> float:
    """From the first start to the last end of a component's ops in these phases, all streams."""
    spans = [span for span in result.spans if span.component == component and span.phase in phases]
    return max(span.end for span in spans) - min(span.start for span in spans) if spans else 0.0


def optimizer_step(component: Component, hardware: HardwareProfile) -> float:
    """AdamW with fp32 state on the host: updated there, or streamed with the gradients through `slots`
    buckets."""
    groups = _groups(component)
    if component.metric == "num_buckets":
        return float(len(groups))
    if component.metric == "largest_bucket_params":
        return float(max(groups))
    if component.metric == "staging_memory_gib":  # master, two moments and the gradient, fp32
        return component.number("slots") * max(groups) * 16 / GIB
    return _seconds(_optimizer(component, hardware, groups), "optimizer", ("optimizer",))


def _optimizer(component: Component, hardware: HardwareProfile, groups: list[int]) -> SimResult:
    """A step with the update on the host, or streamed in buckets of the mean size of `groups`."""
    model = load_model(component.text("model"))
    ranks = component.gpus
    if groups:
        strategy = mop(
            ranks, expert_parallel=ranks, optimizer_bucket_params=round(sum(groups) / len(groups)),
            optimizer_slots=component.count("slots"), offload_inputs=False, grad_dtype="bfloat16",
        )  # fmt: skip
        strategy = replace(
            strategy,
            dense=replace(strategy.dense, grad_tier="host"),
            precision=replace(strategy.precision, grad="float32"),
        )
    else:
        strategy = mop(
            ranks, expert_parallel=ranks, optimizer="host", offload_inputs=False, grad_dtype="bfloat16"
        )
    return _step(component, _plain(model), strategy, 4096, hardware)


def _groups(component: Component) -> list[int]:
    """Parameters of each bucket of a streamed update; none where the host updates."""
    if "bucket_params" not in component.params:
        return []
    ranks = component.gpus
    return _tensor_groups(load_model(component.text("model")), ranks, component.number("bucket_params"))


def _tensor_groups(model: ModelSpec, ranks: int, target: float) -> list[int]:
    """Parameters of the source's buckets: a rank's whole tensors in order, a bucket closed once it has
    `target`. Gate and up are one tensor, as gpt-oss has them."""
    names = {tensor.name: tensor.numel // ranks for tensor in tensors(model)}
    groups, held = [], 0
    for name, numel in names.items():
        if ".experts.gate_proj" in name:
            continue
        held += numel + (names[name.replace("up_proj", "gate_proj")] if ".experts.up_proj" in name else 0)
        if held >= target:
            groups.append(held)
            held = 0
    return [*groups, held] if held else groups


def _plain(model: ModelSpec) -> ModelSpec:
    """The network with the same parameters to a per mille, but no sinks, windows or biases (they don't bear
    on this)."""
    return replace(
        model, attention_sinks=False, sliding_window=0, attention_chunk_size=0, layer_types=(),
        attention_bias="none",
        expert_bias=False, router_bias=False,
    )  # fmt: skip


def vocabulary_projection(component: Component, hardware: HardwareProfile) -> float:
    """Output layer and cross entropy in fp32: the vocabulary component of a one-layer network, by autograd
    over full logits or around the ring.

    Latency is that of the forward: one table calls it so, and three products in it would be twice the fp32
    peak.
    """
    component.one_of("precision", "fp32")
    hidden, tokens = component.count("hidden"), component.count("tokens_per_rank")
    vocabulary, degree = component.count("vocab"), component.count("vocab_degree")
    model = ModelSpec(
        name="head", hidden_size=hidden, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8,
        head_dim=64, vocab_size=vocabulary, intermediate_size=64,
    )  # fmt: skip
    ring = component.does("ring")
    rows = ceil_div(vocabulary, degree) if ring else vocabulary
    weight = rows * hidden * 4 / GIB
    resident = weight + (tokens * hidden * 4 + tokens * 8 + LIBRARIES) / GIB
    if component.metric == "projection_weight_gib":
        return weight
    if component.metric == "resident_memory_gib":
        return resident
    if ring:
        strategy = mop(
            degree, vocab_parallel=degree, optimizer="device", offload_inputs=False, dtype="float32"
        )
    else:
        strategy = fsdp2(degree, fsdp=1, recompute="none", dtype="float32")
    result = _step(component, model, strategy, tokens, hardware)
    if component.metric == "latency_s":
        return _seconds(result, "vocabulary", ("forward",))
    curves = result.memory_curve_by_category
    made = max(map(sum, zip(curves["logits"], curves["gathered_grads"], strict=True))) / GIB
    increment = made + (weight if ring else 0)  # the ring adds into a gradient that a step holds all along
    if component.metric == "peak_memory_increment_gib":
        return increment
    return resident + increment


def checkpoint_offload(component: Component, hardware: HardwareProfile) -> float:
    """A whole step whose layer inputs go to pinned host memory while the budget lasts.

    Its time needs the length of the sequences that the tokens of a step divide into (`seq_len`), which
    decides what attention takes. The source keeps two boundaries a layer but one; its blocks of pinned memory
    are torch's, rounded up to a power of two.
    """
    if component.metric in UNSTATED:
        raise UnsupportedError("metric", "the program beside the step, and what NVML adds, are not stated")
    ranks = component.gpus
    budget = component.number("host_budget_gib_per_rank")
    rows = component.number("tokens_per_step") / component.count("sp")
    boundary = int(rows * component.number("hidden") * 2)
    away = offloaded_boundaries(component.count("boundaries"), boundary, int(budget * GIB))
    sizes = (away, away * boundary / GIB, away * 2 ** (boundary - 1).bit_length() / GIB)
    held = dict(zip(HELD, sizes, strict=True))
    if component.metric in held:
        return held[component.metric] if budget else 0.0
    result = _offloaded(component, hardware)
    tokens = result.training.seq_len * result.training.global_batch
    return result.step_time if component.metric == "latency_s" else tokens / result.step_time / ranks


def _offloaded(component: Component, hardware: HardwareProfile) -> SimResult:
    model = load_model(component.text("model"))
    ranks = component.gpus
    seq, budget = component.count("seq_len"), component.number("host_budget_gib_per_rank")
    strategy = mop(
        ranks, context_parallel=component.count("sp"), expert_parallel=component.count("ep"),
        optimizer="device",
        offload_inputs=budget > 0, offload_inputs_bytes=int(budget * GIB), vocab_parallel=ranks,
        grad_dtype="bfloat16",
        micro_batch=max(1, component.count("tokens_per_step") // seq),
    )  # fmt: skip
    return _step(component, model, strategy, seq, hardware)


def expert_dispatch(component: Component, hardware: HardwareProfile) -> float:
    """One MoE layer with routing given: every intermediate kept, or chunks whose products are checkpoints."""
    component.one_of("precision", "bf16")
    passes = component.one_of("pass", "forward+backward", "forward")
    strategy = _expert_strategy(component)
    result = _expert_layer(component, strategy, hardware)
    if component.metric == "speedup":
        whole = replace(strategy.experts, chunk_tokens=0)
        other = replace(strategy, experts=whole)
        return _expert_layer(component, other, hardware).step_time / result.step_time
    forward = [span for span in result.spans if span.phase == "forward"]
    end = max(span.end for span in (forward if passes == "forward" else result.spans))
    if component.metric == "latency_s":
        return end - min(span.start for span in forward)
    peak = max(size for time, size in result.memory_curve if time < end)
    return (peak + _beside(component)) / GIB


def played(component: Component, hardware: HardwareProfile) -> SimResult | None:
    """The program that a component's time is read from; None where there is none."""
    if component.kind == "expert_dispatch":
        return _expert_layer(component, _expert_strategy(component), hardware)
    if component.kind == "optimizer_step":
        return _optimizer(component, hardware, _groups(component))
    return _offloaded(component, hardware) if component.kind == "checkpoint_offload" else None


def _expert_strategy(component: Component) -> Strategy:
    """Standard EP, LLEP or PipelinedLLEP over `ep` ranks. Capacity 1: the received experts of the published
    peaks are those of that capacity."""
    degree = component.count("ep")
    chunked = "num_chunks" in component.params
    experts = Experts(
        expert_parallel=degree,
        balance="least_loaded" if component.does("least_loaded") else "none",
        chunk_tokens=component.count("chunk_tokens") if chunked else 0,
        max_chunks=component.count("num_chunks") if chunked else 1,
    )
    return replace(fsdp2(degree, expert_parallel=degree, recompute="none"), experts=experts)


def _expert_model(component: Component) -> ModelSpec:
    return ModelSpec(
        name="moe-layer", hidden_size=component.count("hidden"), num_hidden_layers=1,
        num_attention_heads=8, num_key_value_heads=8, head_dim=8, vocab_size=8,
        num_local_experts=component.count("num_experts"),
        num_experts_per_tok=component.count("top_k"),
        moe_intermediate_size=component.count("expert_hidden"),
    )  # fmt: skip


def _expert_layer(component: Component, strategy: Strategy, hardware: HardwareProfile) -> SimResult:
    model = _expert_model(component)
    tokens = component.count("tokens_per_rank")
    training = TrainSpec(seq_len=tokens, global_batch=strategy.world_size, routing=component.text("routing"))
    stack = load_stack(strategy.stack)
    workload = expert_layer(model, strategy, training, hardware.scale_up_size, stack)
    return run(workload, model, hardware, strategy, training, timeline=True)


def _beside(component: Component) -> int:
    """Bytes that the benchmark holds and a layer doesn't: the other ranks' experts, as it makes all of them
    on every rank and works on slices (test_llep.py of SalesforceAIResearch/LeastLoadedEP, whose shapes and
    profiles these are), the pipeline's workspace, and the libraries'."""
    model, degree = _expert_model(component), component.count("ep")
    each = model.ffn_matrices * model.hidden_size * model.moe_intermediate_size * 2
    others = each * (model.num_local_experts - model.num_local_experts // degree)
    workspace = component.number("workspace_mib") if component.states("workspace_mib") else 0.0
    return int(others + workspace * UNITS["MiB"] + LIBRARIES)
