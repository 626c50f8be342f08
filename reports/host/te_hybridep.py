"""What the host does for routed experts whose rows HybridEP's kernels send, beside the alltoall dispatcher's.

    git clone --branch hybrid-ep https://github.com/deepseek-ai/DeepEP  # 94a9f8f
    PYTHONPATH=.:DeepEP python -m reports.host.te_hybridep --sources TransformerEngine/transformer_engine \\
        Megatron-LM/megatron --json reports/host/te_hybridep.json

As te_layers.py measures them, which tells how to install what else it needs: the layers of Megatron-Core
0.18.2 (git tag core_v0.18.2), in turn and one at a time, as short passes are what a loaded machine leaves
alone. HybridEP's compiled module is stood in for: every kernel (routes gathered, scanned, counts padded; rows
sent, permuted; put back, combined) is one op, every tensor of its handle is made, and what else its C++ does
around them is not in it.
"""

import sys
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from reports.host import te_deepep, te_extension, te_layers
from reports.host.te_layers import PHASES, RANKS, ROWS, WIDTH

ROUNDS, EXPERTS = 400, (4, 16)
HANDLE = (
    "sparse_to_dense_map", "rdma_to_attn_map", "attn_to_rdma_map", "num_dispatched_tokens_tensor",
    "local_expert_routing_map", "dense_chunk_layout", "dense_to_expert_map", "tokens_per_expert",
    "overflow_flag",
)  # fmt: skip
"""Tensors of hybrid_ep_cpp.HandleImpl that metadata_preprocessing makes (csrc/hybrid_ep/executor)."""


class Handle:
    """hybrid_ep_cpp.HandleImpl."""

    padded_tokens_per_expert: torch.Tensor | None = None


class Configurer:
    """hybrid_ep_cpp.Configurer, and the configuration that it gives."""

    def __init__(self, **given: Any) -> None:
        vars(self).update(given)

    def __getattr__(self, name: str) -> Any:
        return self if name == "buffer_config" else lambda *_: self

    def is_valid(self, *_: object) -> bool:
        return True


class Runtime:
    """hybrid_ep_cpp.HybridEPBuffer; every kernel one op."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def update_buffer(self, *_: object) -> bool:
        return False

    def metadata_preprocessing(self, *, config: Any, routing_map: torch.Tensor, **_: object) -> Handle:
        local, handle = config.num_of_experts_per_rank, Handle()
        routes = torch.empty(RANKS * routing_map.size(0), routing_map.size(1), dtype=torch.bool)
        dist.all_gather_into_tensor(routes, routing_map)
        for name in HANDLE:
            setattr(handle, name, torch.empty(1, dtype=torch.int32))
        handle.sparse_to_dense_map.zero_()
        handle.padded_tokens_per_expert = torch.full((local,), ROWS // local)
        handle.config, handle.num_of_tokens_per_rank = config, ROWS
        return handle

    def dispatch_with_permute(self, *, hidden: torch.Tensor, with_probs: bool, **_: object) -> Any:
        sent = torch.zeros_like(hidden)
        return sent.clone(), torch.ones(ROWS) if with_probs else None, None

    def combine_with_unpermute(self, *, hidden: torch.Tensor, handle: Any, with_probs: bool, **_: Any) -> Any:
        rows = torch.zeros_like(hidden).clone()
        experts = handle.config.num_of_experts_per_rank * RANKS
        return rows, torch.empty(ROWS, experts) if with_probs else None


class Allocator:
    """hybrid_ep_cpp.ExtendedMemoryAllocator: all ranks are of one domain."""

    def detect_accessible_ranks(self, group: Any) -> int:
        return int(group.size())


def install() -> None:
    te_deepep.install()
    made = ModuleType("hybrid_ep_cpp")
    vars(made).update(
        HybridEPBuffer=Runtime, Configurer=Configurer, ExtendedMemoryAllocator=Allocator, HandleImpl=Handle,
        HybridEpConfigInstance=Configurer,
    )  # fmt: skip
    sys.modules[made.__name__] = made


def begun(doc: str | None) -> tuple[Path, str]:
    """As te_layers.begun, for Megatron-Core 0.18, which imports Triton, and layers one at a time."""
    imported, names = te_extension.install, ("triton", "triton.language", "triton.runtime")

    def with_triton(*given: Any) -> None:
        imported(*given)
        for name in names:
            one = sys.modules[name] = te_extension.Anything(name)
            one.__spec__ = ModuleSpec(name, None)

    te_extension.install, te_layers.LAYERS = with_triton, 1
    target, core = te_layers.begun(doc)
    te_layers.spread_experts()
    return target, core


def main() -> None:
    install()
    target, core = begun(__doc__)
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import fused_a2a

    hybrid: dict[str, Any] = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep"}
    kinds: dict[str, dict[str, Any]] = {"alltoall": {}, "hybridep": hybrid}
    calls: dict[str, te_layers.Call] = {}

    def microbatch(kind: str, local: int, outer: Any, model: Any) -> list[float]:
        fused_a2a.reset_hybrid_ep_buffer()
        if kind == "hybridep":
            fused_a2a.init_hybrid_ep_buffer(group, WIDTH, ROWS, local)
        return te_deepep.microbatch(local, True, outer, model)

    group = parallel_state.get_expert_tensor_and_model_parallel_group()
    for local in EXPERTS:
        for kind, more in kinds.items():
            model = te_layers.network(local, **more)
            calls[f"{kind}, {local}"] = partial(microbatch, kind, local, te_layers.reduced(model), model)
    took = te_layers.timed(calls, ROUNDS)
    every = te_layers.by_phase(took, calls)
    added = {
        f"hybridep, {local}": {
            phase: every[f"hybridep, {local}"][phase] - every[f"alltoall, {local}"][phase] for phase in PHASES
        }
        for local in EXPERTS
    }
    te_layers.written(target, core, took, {"layers": every, "added": added})


if __name__ == "__main__":
    main()
