"""What the host does for mopexec's layers, eager and compiled (`compile: block`).

PYTHONPATH=. .venv/bin/python reports/host/mopexec_layers.py --json reports/host/mopexec_layers.json

As `measure.py`, by seconds of the thread, beside the layers that it measures: from one machine to another a
Linear takes up to a quarter more or less of them, so mopexec's layers are put in proportion to those
(`scale`). Of compiled layers these are guards and wrappers of TorchInductor's graphs, and the Python that
stays between them. Attention is one op each way as on a device, and so is what stands for the experts.
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
from msgspec.structs import replace
from torch import Tensor, nn
from torch.nn import functional as F

from mopexec.model import Routing, Transformer
from mopexec.modules.compiled import compile_blocks
from mopexec.weights.load import fill
from mopexec.weights.source import Seeded
from mopsim.graph.host_costs import LAYER
from mopsim.spec.model import ModelSpec
from reports.host import measure

LAYERS, ROUNDS, BESIDE = measure.LAYERS, 60, "transformers"
DENSE = ModelSpec(
    name="tiny", hidden_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=128, intermediate_size=64, qk_norm="head",
)  # fmt: skip
ROUTED = replace(
    DENSE, intermediate_size=0, num_local_experts=8, num_experts_per_tok=2, moe_intermediate_size=16
)


def attention(q: Tensor, k: Tensor, v: Tensor, core: object, sinks: Tensor | None = None) -> Tensor:
    """As torch's modules call it on a device."""
    q, k, v = (one.transpose(1, 2) for one in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def no_experts(rows: Tensor, chosen: Tensor, weights: Tensor, module: nn.Module) -> Tensor:
    return rows + weights.sum().to(rows.dtype)


def network(spec: ModelSpec, *, compiled: bool) -> Transformer:
    model = Transformer(spec, torch.bfloat16, "cpu", Routing())
    fill(model, Seeded(0))
    layers: Any = model.blocks()
    for layer in layers:
        layer.attention.core = attention
        if layer.is_moe:
            layer.moe.dispatch = no_experts
    if compiled:
        compile_blocks(model)
    return model


def attend(model: Any) -> Callable[[Tensor, Any], Tensor]:
    """The attention of every layer alone, as its graphs have it."""
    from mopexec.modules import compiled

    def run(x: Tensor, given: Any) -> Tensor:
        for layer in model.layers:
            q, k, v = compiled._queries(layer, x, given.cos, given.sin)
            x, hidden = compiled._attended(layer, x, attention(q, k, v, None))
            x = x + hidden
        return x

    return run


def attend_eagerly(model: Any) -> Callable[[Tensor, Any], Tensor]:
    """The same of eager layers, whose second norm counts with what follows it."""

    def run(x: Tensor, given: Any) -> Tensor:
        for layer in model.layers:
            x = x + layer.attention(layer.attention_norm(x), given.cos, given.sin)
        return x

    return run


def through(model: Any) -> Callable[[Tensor, Any], Tensor]:
    def run(x: Tensor, given: Any) -> Tensor:
        for layer in model.layers:
            x = layer(x, given)
        return x

    return run


def calls() -> dict[str, Callable[[], object]]:
    x = torch.randn(1, 8, DENSE.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    dense, routed = network(DENSE, compiled=True), network(ROUTED, compiled=True)
    given = dense.given(torch.zeros(1, 8, dtype=torch.int64), 0)
    eager, eager_routed = network(DENSE, compiled=False), network(ROUTED, compiled=False)
    runs = {
        "attention": attend(dense), "dense": through(dense), "routed": through(routed),
        "eager attention": attend_eagerly(eager), "eager dense": through(eager),
        "eager routed": through(eager_routed),
    }  # fmt: skip

    def both(run: Callable[[Tensor, Any], Tensor]) -> None:
        run(x, given).sum().backward()  # type: ignore[no-untyped-call]

    found: dict[str, Callable[[], object]] = {}
    for name, run in runs.items():
        found |= {f"{name} forward": partial(run, x, given), f"{name} both": partial(both, run)}
    return found | {f"{BESIDE} {name}": call for name, call in measure.variants().items()}


def timed(given: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Linears of a layer that each call takes: all are timed in every round."""
    linear, rows = nn.Linear(16, 16).to(torch.bfloat16), torch.randn(8, 16, dtype=torch.bfloat16)

    def linears() -> None:
        for _ in range(500):
            linear(rows)

    for call in given.values():
        call()
        call()
    rounds: dict[str, list[float]] = {name: [] for name in ("linear", *given)}
    for _ in range(ROUNDS):
        for name, call in {"linear": linears, **given}.items():
            begin = time.thread_time()
            call()
            rounds[name].append(time.thread_time() - begin)
    unit = statistics.median(rounds["linear"]) / 500
    found = {name: statistics.median(times) / unit / LAYERS for name, times in rounds.items()}
    return found | {"linear": unit}


def parts(took: dict[str, float]) -> dict[str, Any]:
    """By difference; `routed` has the router and the sum after the experts, without what is between."""

    def of(name: str, less: str = "") -> dict[str, float]:
        ahead = took[f"{name} forward"] - (took[f"{less} forward"] if less else 0.0)
        both = took[f"{name} both"] - (took[f"{less} both"] if less else 0.0)
        return {"forward": ahead, "backward": both - ahead}

    def layer(eager: str = "") -> dict[str, dict[str, float]]:
        attention = f"{eager}attention"
        return {
            "attention": of(attention),
            "dense_ffn": of(f"{eager}dense", attention),
            "router": of(f"{eager}routed", attention),
        }

    linears = {k.removeprefix(f"{BESIDE} "): v * LAYERS for k, v in took.items() if k.startswith(BESIDE)}
    beside = measure.layers(linears)
    dense = [beside[part][way] for part in ("attention", "dense_ffn") for way in ("forward", "backward")]
    scale = (sum(LAYER["attention"]) + sum(LAYER["dense_ffn"])) / sum(dense)
    return {"compiled": layer(), "eager": layer("eager "), BESIDE: beside, "scale": scale}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    target = parser.parse_args().json
    torch.set_num_threads(1)
    with torch.autograd.set_multithreading_enabled(False):
        took = timed(calls())
    found = {
        "unit": "forward passes of a torch Linear",
        "linear_us": took["linear"] * 1e6,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    } | parts(took)
    target.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
