"""What the host does for the layers of eager software, in forward passes of a torch Linear.

pip install transformers==5.24.0 python reports/host/measure.py --json reports/host/modules.json

Python, torch's dispatcher and autograd cost a host the same whether the kernels are large or small, so tiny
tensors on a CPU show it: no kernel runs long. The unit is the forward of one torch Linear of the same size,
timed on the same core, because that is what is published for other hosts (`host.cpu_launch_time` of a
profile). torch's grouped product loops over experts on a CPU, which no GPU's does, so one op of autograd
stands for it. FSDP2 runs in a fake process group of eight ranks, in which collectives cost nothing.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations import moe

LAYERS, RANKS, ROUNDS, TENSORS, UNIT = 16, 8, 150, (2, 12), "linear"


class GroupedProduct(torch.autograd.Function):
    """One op forward and two backward, as a grouped product is on a device."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, weights)
        return torch.mm(rows, weights[0])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        _, weights = ctx.saved_tensors
        return torch.mm(grad, weights[0].t()), torch.zeros_like(weights)


def grouped_mm(rows: torch.Tensor, weights: torch.Tensor, *args: object, **names: object) -> torch.Tensor:
    return GroupedProduct.apply(rows, weights)  # type: ignore[no-any-return]


class Nothing(nn.Module):
    """Instead of a module whose time is to be left out."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


def timed(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Linears that each call takes: all are timed in every round, so that what disturbs one disturbs all."""
    linear, rows = nn.Linear(16, 16).to(torch.bfloat16), torch.randn(8, 16, dtype=torch.bfloat16)

    def linears() -> None:
        for _ in range(1000):
            linear(rows)

    rounds: dict[str, list[float]] = {name: [] for name in (UNIT, *calls)}
    for call in calls.values():
        call()
        call()
    for _ in range(ROUNDS):
        for name, call in {UNIT: linears, **calls}.items():
            begin = time.perf_counter()
            call()
            rounds[name].append(time.perf_counter() - begin)
    unit = statistics.median(rounds[UNIT]) / 1000
    return {name: statistics.median(found) / unit for name, found in rounds.items()} | {UNIT: unit}


def network(dense: bool = False) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        hidden_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=64, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2, vocab_size=128,
        max_position_embeddings=128, use_cache=False,
        mlp_only_layers=list(range(LAYERS)) if dense else [],
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    model.train()
    return model


def variants() -> dict[str, Callable[[], object]]:
    """Forward and backward of all layers: whole, with parts left out, recomputed."""
    router, attention, again = network(), network(), network()
    for layer in router.model.layers:
        layer.mlp.experts = Experts()
    for layer in attention.model.layers:
        layer.mlp, layer.post_attention_layernorm = Nothing(), Nothing()
    again.gradient_checkpointing_enable({"use_reentrant": False})
    models = {"whole": network(), "router": router, "attention": attention, "dense": network(dense=True)}
    tokens = torch.randint(0, 128, (1, 8))

    def forward(model: Qwen3MoeForCausalLM) -> object:
        return model.model(tokens)

    def both(model: Qwen3MoeForCausalLM) -> object:
        return model.model(tokens).last_hidden_state.sum().backward()

    found: dict[str, Callable[[], object]] = {"again both": partial(both, again)}
    for name, model in models.items():
        found |= {f"{name} forward": partial(forward, model), f"{name} both": partial(both, model)}
    return found


def layers(took: dict[str, float]) -> dict[str, dict[str, float]]:
    """Parts of a layer by difference, and what recomputing it costs besides one more forward."""

    def part(name: str, less: str = "") -> dict[str, float]:
        ahead = took[f"{name} forward"] - (took[f"{less} forward"] if less else 0.0)
        both = took[f"{name} both"] - (took[f"{less} both"] if less else 0.0)
        return {"forward": ahead / LAYERS, "backward": (both - ahead) / LAYERS}

    extra = took["again both"] - took["whole both"] - took["whole forward"]
    return {
        "attention": part("attention"),
        "router": part("router", "attention"),
        "experts": part("whole", "router"),
        "dense_ffn": part("dense", "attention"),
        "checkpoint": {"forward": 0.0, "backward": extra / LAYERS},
    }


class Experts(nn.Module):
    """Instead of experts, with their arguments."""

    def forward(self, rows: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return rows + weights.sum()


class Block(nn.Module):
    """A unit of FSDP2 with some parameters."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self.all = nn.ParameterList(nn.Parameter(torch.randn(16, 16)) for _ in range(tensors))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        for one in self.all:
            rows = torch.mm(rows, one)
        return rows


def sharded(tensors: int, mesh: Any, reshard: bool) -> nn.Sequential:
    model = nn.Sequential(*(Block(tensors) for _ in range(LAYERS)))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    return model


def step(model: nn.Module) -> Callable[[], object]:
    """Clip and a fused AdamW step."""
    model(torch.randn(8, 16)).sum().backward()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def call() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return call


def fsdp2(mesh: Any) -> dict[str, Callable[[], object]]:
    rows = torch.randn(8, 16, requires_grad=True)

    def both(model: nn.Module) -> object:
        return model(rows).sum().backward()

    found: dict[str, Callable[[], object]] = {}
    for n in TENSORS:
        plain = nn.Sequential(*(Block(n) for _ in range(LAYERS)))
        models = {"plain": plain, "once": sharded(n, mesh, False), "twice": sharded(n, mesh, True)}
        found |= {f"{name} {n}": partial(both, model) for name, model in models.items()}
    whole = nn.Sequential(*(Block(TENSORS[1]) for _ in range(LAYERS)))
    return found | {"step whole": step(whole), "step sharded": step(sharded(TENSORS[1], mesh, True))}


def units(took: dict[str, float]) -> dict[str, dict[str, float]]:
    """What FSDP2 adds to a unit's forward and backward, alone and with each of its parameters: each time that
    it gathers, and the rest (its hooks, the reduction). A unit kept from forward to backward gathers once."""
    gather = {n: (took[f"twice {n}"] - took[f"once {n}"]) / LAYERS for n in TENSORS}
    rest = {n: (took[f"once {n}"] - took[f"plain {n}"]) / LAYERS - gather[n] for n in TENSORS}
    return {"gather": _line(gather), "rest": _line(rest)}


def _line(found: dict[int, float]) -> dict[str, float]:
    few, many = TENSORS
    each = (found[many] - found[few]) / (many - few)
    return {"unit": found[few] - few * each, "parameter": each}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    target = parser.parse_args().json
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    moe._grouped_mm = grouped_mm
    took = timed(variants() | fsdp2(mesh))
    found = {
        "unit": "forward passes of a torch Linear",
        "linear_us": took[UNIT] * 1e6,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "layer": layers(took),
        "fsdp2": units(took),
        "update": {name: took[f"step {name}"] / (LAYERS * TENSORS[1]) for name in ("whole", "sharded")},
    }
    target.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
