"""What the host does for Megatron-Core's own layers, as measure.py does for those of transformers.

    pip install megatron-core==0.16.1
    python reports/host/megatron_core.py --json reports/host/megatron_core.json

Its local modules, dense and with experts one after the other (2, 4 and 8 of them: the line through them tells
what all but the experts takes). What it asks of CUDA without need (streams, events, generators) is answered
by nothing.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import random as parallel_random
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

LAYERS, ROUNDS, EXPERTS = 16, 40, (2, 4, 8)


class Nothing:
    """A stream or event that orders nothing."""

    def __init__(self, *args: object, **names: object) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., "Nothing"]:
        return lambda *args, **names: self


def without_cuda() -> None:
    torch.cuda._lazy_init = lambda: None
    torch.cuda.random._lazy_init = lambda: None
    torch.cuda.get_rng_state = lambda *args, **names: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda *args, **names: None
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.is_available = lambda: False
    torch.cuda.current_stream = Nothing
    torch.cuda.Stream = torch.cuda.Event = Nothing
    torch.cuda.stream = lambda *args: contextlib.nullcontext()
    torch.Tensor.record_stream = lambda self, *args: None
    parallel_random._get_cuda_rng_state = lambda *args, **names: torch.get_rng_state()
    parallel_random._set_cuda_rng_state = lambda *args, **names: None
    moe_utils.te_general_gemm = None
    make = dist.new_group
    dist.new_group = lambda *args, **names: make(*args, **(names | {"backend": "fake"}))


def network(experts: int = 0, **more: Any) -> GPTModel:
    routed: dict[str, Any] = {
        "num_moe_experts": experts, "moe_router_topk": 1, "moe_router_pre_softmax": True,
        "moe_token_dispatcher_type": "alltoall", "moe_ffn_hidden_size": 16, "add_bias_linear": False,
    }  # fmt: skip
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=64, num_attention_heads=4, ffn_hidden_size=64, bf16=True,
        params_dtype=torch.bfloat16, use_cpu_initialization=True, gradient_accumulation_fusion=False,
        hidden_dropout=0.0, attention_dropout=0.0, bias_dropout_fusion=False, bias_activation_fusion=False,
        masked_softmax_fusion=False, **(routed if experts else {}), **more,
    )  # fmt: skip
    layer = get_gpt_layer_local_spec(num_experts=experts or None, moe_grouped_gemm=False)
    model = GPTModel(config=config, transformer_layer_spec=layer, vocab_size=128, max_sequence_length=128)
    return model.to(torch.bfloat16).train()


def timed(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Linears of each call, as measure.py counts them."""
    linear, rows = nn.Linear(16, 16).to(torch.bfloat16), torch.randn(8, 16, dtype=torch.bfloat16)

    def linears() -> None:
        for _ in range(1000):
            linear(rows)

    rounds: dict[str, list[float]] = {name: [] for name in ("unit", *calls)}
    for call in calls.values():
        call()
    for _ in range(ROUNDS):
        for name, call in {"unit": linears, **calls}.items():
            begin = time.perf_counter()
            call()
            rounds[name].append(time.perf_counter() - begin)
    unit = statistics.median(rounds["unit"]) / 1000
    return {name: statistics.median(found) / unit for name, found in rounds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    target = parser.parse_args().json
    torch.set_num_threads(1)
    without_cuda()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    parallel_state.initialize_model_parallel(1, 1)
    parallel_random.model_parallel_cuda_manual_seed(1)
    tokens, places = torch.randint(0, 128, (1, 8)), torch.arange(8)[None]
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)

    def forward(model: GPTModel) -> object:
        return model(tokens, places, mask)

    def both(model: GPTModel) -> object:
        return model(tokens, places, mask).float().sum().backward()

    again = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    models = {"dense": network(), "dense again": network(**again)}
    models |= {f"{n} experts": network(n) for n in EXPERTS}
    calls: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        calls |= {f"{name} forward": partial(forward, model), f"{name} both": partial(both, model)}
    took = {name: size / LAYERS for name, size in timed(calls).items()}
    layers = {
        name: {"forward": took[f"{name} forward"], "backward": took[f"{name} both"] - took[f"{name} forward"]}
        for name in models
    }
    found = {"unit": "forward passes of a torch Linear", "torch": torch.__version__,
             "megatron_core": megatron.core.__version__, "layer": layers}  # fmt: skip
    target.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
