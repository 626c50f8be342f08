"""What torch's DTensor adds to torchtitan's attention with norms of heads, latent attention and experts.

git clone https://github.com/pytorch/torchtitan && git -C torchtitan checkout v0.2.2
PYTHONPATH=. .venv/bin/python reports/host/titan_tensor.py torchtitan --json reports/host/titan_tensor.json

Its modules, whole and under its plans (models/qwen3, deepseek_v3 and llama4, infra/parallelize.py), beside
the layers of dtensor.py and in proportion to what that found of attention (`scale`). Values between products
stay DTensors there (use_local_output=False), so that rotary embeddings and norms are dispatched by DTensor
too. As titan_moe.py runs them: one expert-parallel rank, two tensor-parallel ones, seconds of the thread.
`split`: experts split over tensor-parallel ranks (TensorParallel), `exchanged split`: exchanged too
(ExpertTensorParallel), `exchanged`: ranks that exchange each their part of the tokens
(ReordererSequenceParallel). SDPA has the sharding of torch's CUDA kernels.
"""

import argparse
import statistics
import sys
import time
import types
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch._dynamo.backends.debugging  # before stand-ins for Triton
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from mopsim.graph.host_costs import DTENSOR
from reports.host import dtensor, titan_moe
from reports.host.output import write

LAYERS, ROUNDS, RANKS, SIZE, HEAD, TOKENS = 4, 30, 2, 64, 16, 8
PACKAGES = ("components", "protocols", "config", *(f"models.{one}{part}" for one in ("qwen3", "deepseek_v3")
            for part in ("", ".model")))  # fmt: skip
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def modules(source: Path) -> SimpleNamespace:
    """torchtitan's modules; what else they import is left out."""
    cast(Any, torch).compile = lambda call=None, **_: call or (lambda made: made)
    moe, expert_parallel = titan_moe.modules(source)
    for name in PACKAGES:
        package = types.ModuleType(f"torchtitan.{name}")
        package.__path__ = [str(source / "torchtitan" / name.replace(".", "/"))]
        sys.modules[package.__name__] = package
    anything = (
        "BaseTokenizer",
        "AttentionMasksType",
        "ModelProtocol",
        "Qwen3ModelArgs",
        "DeepSeekV3ModelArgs",
    )
    for name in ("components.tokenizer", "protocols.model", "protocols.train_spec", "models.qwen3.model.args",
                 "models.deepseek_v3.model.args"):  # fmt: skip
        stub = types.ModuleType(f"torchtitan.{name}")
        stub.__dict__.update(dict.fromkeys(anything, object))
        sys.modules[stub.__name__] = stub
    names = {"MoE": moe.MoE, "FeedForward": moe.FeedForward, "build_moe": None}
    sys.modules["torchtitan.models.moe"].__dict__.update(names)
    qwen3, deepseek = (
        import_module(f"torchtitan.models.{one}.model.model") for one in ("qwen3", "deepseek_v3")
    )
    return SimpleNamespace(moe=moe, parallel=expert_parallel, qwen3=qwen3, deepseek=deepseek)


class Replicated(ParallelStyle):
    """torchtitan/distributed/__init__.py, NoParallel: the module on DTensors that every rank has whole."""

    def __init__(self, local: bool) -> None:
        super().__init__()
        self.local = local

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(_: nn.Module, given: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
            first = given[0]
            if not isinstance(first, DTensor):
                first = DTensor.from_local(first, mesh, (Replicate(),), run_check=False)
            return (first, *given[1:])

        def leave(_: nn.Module, out: DTensor, mesh: DeviceMesh) -> Tensor:
            return out.to_local() if self.local else out

        return torch.distributed.tensor.distribute_module(module, device_mesh, None, enter, leave)


@register_sharding(FLASH.default)  # type: ignore[untyped-decorator]
def _forward(*_: object, **__: object) -> list[Any]:
    heads = Shard(1)
    return [([heads] * 2, [*[heads] * 3, *[None] * 4])]


@register_sharding(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default)  # type: ignore[untyped-decorator]
def _backward(*_: object, **__: object) -> list[Any]:
    heads = Shard(1)
    return [([heads] * 3, [*[heads] * 6, *[None] * 4])]


def split_attention(kind: str) -> dict[str, ParallelStyle]:
    """The plan of a layer's attention."""
    whole = {"input_layouts": (Shard(1), Replicate(), None, None)}
    gathered = PrepareModuleInput(**whole, desired_input_layouts=(Replicate(), Replicate(), None, None))
    kept: ParallelStyle = ColwiseParallel(use_local_output=False)
    plan = {"norm": SequenceParallel(), "attention": gathered, "attention.wq": kept,
            "attention.wo": RowwiseParallel(output_layouts=Shard(1))}  # fmt: skip
    if kind == "head norms":
        of_heads = SequenceParallel(sequence_dim=2)
        return plan | {"attention.wk": kept, "attention.wv": kept, "attention.q_norm": of_heads,
                       "attention.k_norm": of_heads}  # fmt: skip
    heads = (Shard(1),) * 3
    inner = PrepareModuleInput(input_layouts=heads, desired_input_layouts=heads, use_local_output=True)
    again = Replicated(local=False)
    return plan | {"attention.wkv_a": again, "attention.kv_norm": again, "attention.wkv_b": kept,
                   "attention.inner_attention": inner}  # fmt: skip


def attention(
    source: SimpleNamespace, kind: str, split: bool, meshes: Mapping[str, DeviceMesh]
) -> nn.ModuleList:
    layers = nn.ModuleList()
    common = {"dim": SIZE, "n_heads": 4, "norm_eps": 1e-6, "attn_type": "sdpa"}
    for _ in range(LAYERS):
        layer = nn.Module()
        layer.norm = nn.RMSNorm(SIZE)
        if kind == "head norms":
            asked = SimpleNamespace(**common, n_kv_heads=2, head_dim=HEAD, qk_norm=True)
            layer.attention = source.qwen3.Attention(asked)
        else:
            sizes = {"q_lora_rank": 0, "kv_lora_rank": 32, "qk_nope_head_dim": HEAD, "qk_rope_head_dim": 8,
                     "v_head_dim": HEAD, "max_seq_len": TOKENS, "original_seq_len": 4096, "rope_factor": 1,
                     "mscale": 1}  # fmt: skip
            layer.attention = source.deepseek.Attention(SimpleNamespace(**common, **sizes))
        layers.append(layer)
    _filled(layers)
    for layer in layers if split else ():
        parallelize_module(layer, meshes["tp"], split_attention(kind))
    return layers


def experts(
    source: SimpleNamespace, how: str, shared: int, meshes: Mapping[str, DeviceMesh]
) -> nn.ModuleList:
    layers, ways = nn.ModuleList(), source.parallel
    asked = source.moe.MoEArgs(num_experts=8, num_shared_experts=shared, top_k=2, score_before_experts=False)
    for _ in range(LAYERS):
        layer = nn.Module()
        layer.norm, layer.moe = nn.RMSNorm(SIZE), source.moe.MoE(asked, SIZE, HEAD)
        layers.append(layer)
    _filled(layers)
    styles = {"split": (ways.TensorParallel(), "tp"),
              "exchanged split": (ways.ExpertTensorParallel(), "both"),
              "exchanged": (ways.ExpertParallel(), "ep"), "sent": (ways.ExpertParallel(), "ep")}  # fmt: skip
    rows, whole = {"input_layouts": (Shard(1),)}, {"desired_input_layouts": (Replicate(),)}
    sums = {"output_layouts": (Partial(),), "desired_output_layouts": (Shard(1),)}
    narrow = ColwiseParallel()
    for layer in layers:
        plan: dict[str, ParallelStyle] = {
            "norm": SequenceParallel(), "moe.router.gate": Replicated(local=True),
            "moe": PrepareModuleInputOutput(**rows, **whole, use_local_input=True, **sums),
        }  # fmt: skip
        plan |= {"moe.reorderer": ways.ReordererSequenceParallel()} if how == "exchanged" else {}
        down = RowwiseParallel(output_layouts=Partial())
        names = {"w1": narrow, "w2": down, "w3": narrow} if shared else {}
        plan |= {f"moe.shared_experts.{name}": style for name, style in names.items()}
        if how not in ("one", "sent"):
            parallelize_module(layer, meshes["tp"], plan)
        if how != "one":
            style, mesh = styles[how]
            parallelize_module(layer.moe.experts, meshes[mesh], style)
    return layers


def _filled(layers: nn.ModuleList) -> None:
    for one in layers.parameters():
        nn.init.normal_(one)
    layers.to(torch.bfloat16)


def attend(layers: nn.ModuleList, rope: Tensor, x: Tensor) -> Tensor:
    for layer in cast(Any, layers):
        x = x + layer.attention(layer.norm(x), rope, None, None)
    return x


def route(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in cast(Any, layers):
        x = x + layer.moe(layer.norm(x))
    return x


def calls(source: SimpleNamespace) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Each with what it is given."""
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("ep", "etp"))
    meshes = {"both": mesh, "ep": mesh["ep"], "tp": init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))}
    own, part = (
        torch.randn(1, rows, SIZE, dtype=torch.bfloat16, requires_grad=True)
        for rows in (TOKENS, TOKENS // RANKS)
    )
    found: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {}
    dtensor.LAYERS = LAYERS
    ropes = {
        "head norms": torch.randn(TOKENS, 2 * HEAD),
        "latent": torch.polar(torch.ones(TOKENS, 4), torch.randn(TOKENS, 4)),
    }
    for split, x in ((False, own), (True, part)):
        found[f"plain, {split}"] = dtensor.network(False, split), x
        for kind, rope in ropes.items():
            found[f"{kind}, {split}"] = partial(attend, attention(source, kind, split, meshes), rope), x
    for how in ("one", "sent", "split", "exchanged split", "exchanged"):
        for shared in (0, 1):
            given = own if how in ("one", "sent") else part
            found[f"{how}, {shared}"] = partial(route, experts(source, how, shared, meshes)), given
    return found


def timed(found: Mapping[str, tuple[Callable[[Tensor], Tensor], Tensor]]) -> dict[str, tuple[float, float]]:
    """Seconds of the thread of a layer's forward and backward, medians of rounds of all."""
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    for turn in range(ROUNDS + 3):
        for name, (call, x) in found.items():
            begin = time.thread_time()
            out = call(x)
            middle = time.thread_time()
            out.sum().backward()  # type: ignore[no-untyped-call]
            if turn > 2:
                end = time.thread_time()
                rounds[name].append(((middle - begin) / LAYERS, (end - middle) / LAYERS))
    return {name: cast(tuple[float, float], tuple(map(statistics.median, zip(*one, strict=True))))
            for name, one in rounds.items()}  # fmt: skip


def added(took: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """Linears, in proportion to what DTensor adds to plain attention in dtensor.json."""

    def more(name: str, less: str) -> tuple[float, float]:
        return took[name][0] - took[less][0], took[name][1] - took[less][1]

    unit = sum(more("plain, True", "plain, False")) / sum(DTENSOR["attention"])
    whole = {
        "attention": more("plain, True", "plain, False"),
        "head_norms": more("head norms, True", "head norms, False"),
        "latent": more("latent, True", "latent, False"), "split": more("split, 0", "one, 0"),
        "exchanged_split": more("exchanged split, 0", "sent, 0"),
        "exchanged": more("exchanged, 0", "sent, 0"),
    }  # fmt: skip
    shared = more("split, 1", "split, 0")
    plain = more("one, 1", "one, 0")
    whole["shared_experts"] = shared[0] - plain[0], shared[1] - plain[1]
    return {"unit_s": unit, "added": {name: {"forward": one[0] / unit, "backward": one[1] / unit}
                                      for name, one in whole.items()}}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    write(added(timed(calls(modules(options.source)))), options.json)


if __name__ == "__main__":
    main()
