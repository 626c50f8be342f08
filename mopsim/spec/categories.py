"""Memory categories, components, runtimes, families: one vocabulary for the simulator and the executor."""

from collections.abc import Mapping
from typing import Literal, get_args

Runtime = Literal["flat_units", "fully_shard", "split_modules"]
RUNTIMES: tuple[str, ...] = get_args(Runtime)

FAMILIES = ("mop", "fsdp2", "zero_offload", "megatron")
"""Functions of `mopsim.strategies`."""

CATEGORIES = (
    "params",  # resident parameter shards
    "grads",  # resident gradient shards
    "optimizer",  # master weights and moments
    "gathered",  # gathered full parameters of a unit in use
    "gathered_grads",  # full gradients of a unit before they are reduced and sharded
    "boundaries",  # layer inputs kept from forward to backward
    "activations",  # everything a layer makes besides what is named below
    "dispatch",  # routed tokens on their way to, through and back from the experts
    "logits",  # logits or strips, the loss's per-token numbers, the ring's moving block
    "staging",  # optimizer buckets on the device
    "framework",  # not made by tensors: contexts, communication buffers (simulator and CUDA only)
)

COMPONENTS = (
    "embedding", "attention", "dense_ffn", "router", "experts", "shared_experts", "vocabulary", "optimizer",
    "other",
)  # fmt: skip
WAITING = "waiting"
"""Beside the components: seconds in which the compute stream stands still."""
WAITS = {
    "all_gather": "all-gathers", "reduce_scatter": "reductions of gradients", "all_reduce": "all-reduces",
    "all_to_all": "all-to-alls", "send_recv": "sends between neighbours",
    "h2d": "copies from the host", "d2h": "copies to the host", "peers": "other pipeline stages",
    "host": "the host, which starts kernels late", "host_optimizer": "the optimizer on the host",
    "host_memory": "gradients that the host adds", "memory_bound": "kernels on other streams",
}  # fmt: skip
"""What compute waits for, by kind of `SimResult.exposed`; mopsim.spec.line says it of one plan."""
SHOWN_AS = {"peers": "other stages"}
"""Kinds of `SimResult.exposed` that people see under another name."""
STEP_PARTS = {
    "matmul": ("matmul",),
    "attention": ("attention",),
    "grouped_matmul": ("grouped_matmul",),
    "memory": ("memory_bound", "optimizer"),
    "host": ("host",),
    "network": ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send_recv"),
    "copies": ("h2d", "d2h", "host_optimizer", "host_memory"),
}
"""Part of a step, as far as its error goes -> kinds of `SimResult.busy`, of those of WAITING_PARTS kinds of
`SimResult.exposed`."""
WAITING_PARTS = ("host", "network", "copies")
MODULES = ("core_attn", "layernorm", "moe_act", "mla_up_proj", "mlp", "moe")
"""Parts of a layer that selective recomputation names beside the components (Megatron-Core's names)."""
KEPT = (
    "q_proj", "k_proj", "v_proj", "attention_core", "o_proj", "gate_proj", "up_proj", "down_proj", "dispatch",
    "combine", "experts_gate", "experts_up", "experts_down",
)  # fmt: skip
"""Kernels of a layer that a recomputation by operator may leave out (names of the layers' tapes)."""
NO_PRODUCTS = ("attention_core", "dispatch", "combine")
"""Those of them that no recipe of products changes."""
JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"), "up_proj": ("gate_proj", "up_proj"),
    "experts_up": ("experts_gate", "experts_up"),
}  # fmt: skip
"""Kernels of several products at once, where a tape has them, and those products' names."""
PHASES = ("forward", "recompute", "backward", "optimizer")

SPOKEN = {
    "params": "parameters", "grads": "gradients", "gathered": "gathered parameters",
    "gathered_grads": "gathered gradients", "optimizer": "optimizer states", "dispatch": "routed tokens",
    "host": "tensors on the host", "boundaries": "layer inputs",
}  # fmt: skip
"""Categories of memory whose name in a sentence is another."""


def spoken(category: str) -> str:
    """'gradients are': a category of memory as the subject of a sentence."""
    name = SPOKEN.get(category, category)
    return f"{name} {'is' if name in ('framework', 'staging') else 'are'}"


def shown_as(parts: Mapping[str, float]) -> dict[str, float]:
    """Amounts by kind, under the names that people see."""
    return {SHOWN_AS.get(kind, kind): part for kind, part in parts.items()}
