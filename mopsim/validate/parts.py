"""Components that are parts of a step: lowered as such and played by the engine."""

import msgspec

from mopsim.engine import SimResult, simulate
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.model import ModelSpec
from mopsim.spec.presets import load_model
from mopsim.spec.strategy import Experts, Strategy, Vocabulary
from mopsim.spec.training import TrainSpec
from mopsim.spec.units import UNITS
from mopsim.strategies import fsdp2, mop
from mopsim.validate.component import Component, InexpressibleError

GIB = UNITS["GiB"]


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
    """AdamW with fp32 state on the host: updated there, or streamed through `slots` buckets."""
    model = load_model(component.text("model"))
    ranks = int(component.row.get("num_gpus") or 8)
    if component.metric != "latency_s":
        raise InexpressibleError(
            "metric", "the source's buckets never split a tensor, ours are a cap: sizes differ by design"
        )
    if "bucket_params" in component.params:
        strategy = mop(
            ranks, experts=ranks, bucket_params=int(component.number("bucket_params")),
            slots=int(component.number("slots")), boundary_tier="device",
        )  # fmt: skip
    else:
        strategy = mop(ranks, experts=ranks, state="host", boundary_tier="device")
    result = _step(component, _plain(model), strategy, 4096, hardware)
    return _seconds(result, "optimizer", ("optimizer",))


def _plain(model: ModelSpec) -> ModelSpec:
    """The network with the same parameters to a per mille, but no sinks, windows or biases (they don't bear
    on this)."""
    return msgspec.structs.replace(
        model, attention_sinks=False, sliding_window=0, attention_bias="none", expert_bias=False,
        router_bias=False
    )  # fmt: skip


def vocabulary_projection(component: Component, hardware: HardwareProfile) -> float:
    """Output layer and cross entropy in fp32: the vocabulary component of a one-layer network.

    Latency is that of the forward: one table calls it so, and three products in it would be twice the fp32
    peak.
    """
    hidden, tokens = int(component.number("hidden")), int(component.number("tokens_per_rank"))
    vocabulary, degree = int(component.number("vocab")), int(component.number("vocab_degree"))
    model = ModelSpec(
        name="head", hidden_size=hidden, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8,
        head_dim=64, vocab_size=vocabulary, intermediate_size=64,
    )  # fmt: skip
    ring = component.system == "Ring-DTP"
    base = mop(degree, vocabulary=degree, state="device", boundary_tier="device", precision="float32")
    full = msgspec.structs.replace(base, vocabulary=Vocabulary(loss="full"))
    full = msgspec.structs.replace(full, dense=msgspec.structs.replace(full.dense, shard=1))
    rows = -(-vocabulary // degree) if ring else vocabulary
    weight = rows * hidden * 4 / GIB
    batch = tokens * hidden * 4 / GIB
    if component.metric == "projection_weight_gib":
        return weight
    if component.metric == "resident_memory_gib":
        return weight + batch + tokens * 8 / GIB
    result = _step(component, model, base if ring else full, tokens, hardware)
    if component.metric == "latency_s":
        return _seconds(result, "vocabulary", ("forward",))
    transient = result.memory_by_category.get("logits", 0) + result.memory_by_category.get(
        "gathered_grads", 0
    )
    increment = transient / GIB + 2 * batch
    if component.metric == "peak_memory_increment_gib":
        return increment
    if component.metric == "peak_memory_gib":
        return weight + batch + increment
    raise InexpressibleError("metric", f"{component.metric} has no counterpart")


def checkpoint_offload(component: Component, hardware: HardwareProfile) -> float:
    """A whole step whose layer inputs go to pinned host memory while the budget lasts."""
    model = load_model(component.text("model"))
    ranks = int(component.row.get("num_gpus") or 8)
    budget = component.number("host_budget_gib_per_rank")
    strategy = mop(
        ranks, sequence=int(component.number("sp")), experts=int(component.number("ep")), state="device",
        boundary_tier="host" if budget else "device", host_budget=int(budget * GIB), vocabulary=ranks,
    )  # fmt: skip
    seq = int(component.number("tokens_per_step")) // ranks * ranks
    if component.metric not in ("latency_s", "tokens_per_s_per_gpu"):
        raise InexpressibleError(
            "metric", "two boundaries a layer and a stateless optimizer in the source, one and AdamW here"
        )
    result = _step(component, model, strategy, seq, hardware)
    return result.step_time if component.metric == "latency_s" else seq / result.step_time / ranks


def expert_dispatch(component: Component, hardware: HardwareProfile) -> float:
    """One MoE layer, forward: every intermediate kept (standard), or chunk by chunk (pipelined)."""
    if "LLEP" in component.system:
        raise InexpressibleError("system", "least-loaded placement is not simulated")
    if component.text("pass") != "forward":
        raise InexpressibleError("pass", "only the forward pass has a counterpart")
    hidden, tokens = int(component.number("hidden")), int(component.number("tokens_per_rank"))
    degree = int(component.number("ep"))
    model = ModelSpec(
        name="moe-layer", hidden_size=hidden, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=8, vocab_size=8, num_local_experts=int(component.number("num_experts")),
        num_experts_per_tok=int(component.number("top_k")),
        moe_intermediate_size=int(component.number("expert_hidden")),
    )  # fmt: skip
    base = fsdp2(degree, experts=degree, recompute="none")
    strategy = msgspec.structs.replace(base, experts=Experts(degree=degree))
    result = _step(component, model, strategy, tokens, hardware)
    if component.metric == "latency_s":
        found = [s for s in result.spans if s.component in ("experts", "router") and s.phase == "forward"]
        found = [span for span in found if not span.name.startswith("gather")]
        return max(span.end for span in found) - min(span.start for span in found)
    kept = _highest(result, ("activations", "dispatch"), "experts")
    return (kept + _weights(model, degree) + 2 * tokens * hidden * 2) / GIB


def _highest(result: SimResult, categories: tuple[str, ...], component: str) -> float:
    """Most bytes of these categories while the component's forward runs."""
    ends = [span.end for span in result.spans if span.component == component and span.phase == "forward"]
    curves = [result.memory_curve_by_category[name] for name in categories]
    times = [time for time, _ in result.memory_curve]
    return max(
        (sum(values) for time, *values in zip(times, *curves, strict=True) if time <= max(ends)), default=0.0
    )


def _weights(model: ModelSpec, degree: int) -> float:
    """Bytes of one rank's experts in bf16."""
    each = 3 * model.hidden_size * model.moe_intermediate_size * 2
    return model.num_local_experts / degree * each
