"""What the host does for Transformer Engine's modules and Megatron-Core's layers made of them.

    pip install --no-deps megatron-core==0.14.0 einops onnx onnxscript onnx_ir ml_dtypes protobuf
    git clone --depth 1 --branch v2.7 https://github.com/NVIDIA/TransformerEngine
    python -m reports.host.te_layers --sources TransformerEngine/transformer_engine \\
        SITE_PACKAGES/megatron --json reports/host/te_layers.json

As measure.py and megatron_core.py measure theirs, the least of many passes. te_extension.py stands in for
Transformer Engine's compiled module: what is measured is Python, autograd and one op of torch a kernel, not
what the real module does in C++ around a kernel (cuBLASLt's choice of an algorithm), nor Triton's launches.
"""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import linear_regression
from time import thread_time as clock
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import silu
from torch.testing._internal.distributed.fake_pg import FakeStore

from reports.host import te_extension

LAYERS, ROUNDS, WARM, AGAIN, RANKS, UNIT = 8, 20, 2, 4, 8, "linear"
VERSION, EXPERTS, ROWS, WIDTH = "2.7.0", (2, 4, 8, 16), 64, 32
PHASES = ("forward", "backward")
Call = Callable[[], list[float]]


def timed(calls: dict[str, Call], count: int = ROUNDS) -> dict[str, float]:
    """Linears of each call's forward and backward: the thread's own time, in so many rounds; the first ones
    do not count."""
    unit, rows = nn.Linear(16, 16).to(torch.bfloat16), torch.randn(8, 16, dtype=torch.bfloat16)
    rounds: dict[str, list[float]] = {}
    for at in range(count + WARM):
        begin = clock()
        for _ in range(1000):
            unit(rows)
        found = {UNIT: (clock() - begin) / 1000}
        for name, call in calls.items():
            runs = [call() for _ in range(AGAIN)]
            found[f"{name} forward"] = min(ahead - begin for begin, ahead, _ in runs)
            found[f"{name} backward"] = min(over - ahead for _, ahead, over in runs)
        for name, took in found.items() if at >= WARM else ():
            rounds.setdefault(name, []).append(took)
    one = min(rounds[UNIT])
    return {name: min(took) / one for name, took in rounds.items()} | {UNIT: one}


def passes(call: Callable[[], torch.Tensor]) -> list[float]:
    times = [clock()]
    out = call()
    times.append(clock())
    out.backward(torch.zeros_like(out))
    return [*times, clock()]


class Chain(nn.Module):
    """Modules one after the other, so that a pass's own cost is shared; views that a call needs are kept."""

    def __init__(self, make: Callable[[], nn.Module], more: tuple[object, ...] = ()) -> None:
        super().__init__()
        self.all, self.more = nn.ModuleList(make() for _ in range(LAYERS)), more

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        for one in self.all:
            rows = one(rows, *self.more)
            rows = rows[0] if isinstance(rows, tuple) else rows
        return rows


def modules() -> dict[str, Chain]:
    """Transformer Engine's own, as Megatron-Core makes them."""
    import transformer_engine.pytorch as te

    bf16: dict[str, Any] = {"params_dtype": torch.bfloat16}
    made: dict[str, Chain] = {
        "torch Linear": Chain(lambda: nn.Linear(WIDTH, WIDTH, bias=False).to(torch.bfloat16)),
        "Linear": Chain(lambda: te.Linear(WIDTH, WIDTH, bias=False, **bf16)),
        "LayerNormLinear": Chain(
            lambda: te.LayerNormLinear(WIDTH, WIDTH, bias=False, normalization="RMSNorm", **bf16)
        ),
        "RMSNorm": Chain(lambda: te.RMSNorm(WIDTH, **bf16)),
    }
    for n in (1, *EXPERTS):
        splits = [ROWS // n] * n
        made[f"GroupedLinear {n}"] = Chain(
            lambda n=n: te.GroupedLinear(n, WIDTH, WIDTH, bias=False, **bf16), (splits,)
        )
    return made


def gathered(gather: Callable[..., object], out: torch.Tensor, given: torch.Tensor, **more: object) -> None:
    """Counts of tokens have to be some: every rank's are this one's."""
    gather(out, given, **more)
    out.view(-1, given.numel()).copy_(given.view(1, -1))


def exchanged(exchange: Callable[..., object], out: torch.Tensor, *given: object, **more: object) -> object:
    """What is received is nothing rather than not a number, by which no token could be routed."""
    found = exchange(out, *given, **more)
    out.zero_()
    return found


def of_modules(recipe: object = None, kind: str = "") -> dict[str, Call]:
    from transformer_engine.pytorch import fp8_autocast

    rows = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)

    def forward(chain: Chain) -> torch.Tensor:
        with fp8_autocast(enabled=True, fp8_recipe=recipe) if recipe else contextlib.nullcontext():
            return chain(rows)

    made = modules().items()
    return {f"{name}{kind}": partial(passes, partial(forward, chain)) for name, chain in made}


def usual() -> dict[str, Any]:
    """Of every layer's configuration."""
    return {
        "num_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": 4, "num_query_groups": 2,
        "kv_channels": 16, "ffn_hidden_size": WIDTH, "bf16": True, "params_dtype": torch.bfloat16,
        "use_cpu_initialization": True, "normalization": "RMSNorm", "qk_layernorm": True,
        "gated_linear_unit": True, "activation_func": silu, "add_bias_linear": False, "hidden_dropout": 0.0,
        "attention_dropout": 0.0, "gradient_accumulation_fusion": True, "apply_rope_fusion": True,
        "bias_activation_fusion": True, "bias_dropout_fusion": True,
    }  # fmt: skip


def network(experts: int = 0, **more: Any) -> nn.Module:
    """Layers of Megatron-Core on Transformer Engine; so many experts on each of eight ranks."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
    from megatron.core.transformer.transformer_config import TransformerConfig

    routed: dict[str, Any] = {
        "num_moe_experts": RANKS * experts, "moe_router_topk": 2, "moe_router_dtype": "fp32",
        "moe_grouped_gemm": True, "moe_permute_fusion": True, "moe_token_dispatcher_type": "alltoall",
        "moe_ffn_hidden_size": 32, "expert_model_parallel_size": RANKS,
        "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-3,
    }  # fmt: skip
    bare = more.pop("bare", False)
    config = TransformerConfig(**(usual() | (routed if experts else {}) | more))
    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=bool(experts), qk_layernorm=True
    )
    if bare:
        layer.submodules.mlp = layer.submodules.pre_mlp_layernorm = IdentityOp
        layer.submodules.mlp_bda = IdentityFuncOp
    model = GPTModel(config=config, transformer_layer_spec=layer, vocab_size=128, max_sequence_length=128,
                     position_embedding_type="rope", pre_process=False, post_process=False)  # fmt: skip
    return model.to(torch.bfloat16).train()


def of_layers() -> dict[str, Call]:
    """Layers in Megatron-Core's data parallelism, in a microbatch before the last, which reduces nothing."""
    again = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    kinds: dict[str, dict[str, Any]] = {"": {}, ", mxfp8": {"fp8": "e4m3", "fp8_recipe": "mxfp8"}}
    models: dict[str, nn.Module] = {"dense again": network(**again)}
    for kind, more in kinds.items():
        models |= {f"attention{kind}": network(bare=True, **more), f"dense{kind}": network(**more)}
        models |= {f"{n} experts{kind}": network(n, **more) for n in EXPERTS}
    models |= {f"{n} experts, composed": network(n, moe_permute_fusion=False) for n in EXPERTS[1:]}
    calls: dict[str, Call] = {}
    for name, model in models.items():
        calls[name] = partial(microbatch, reduced(model), model, False)
    model, routers = network(EXPERTS[1]), network(EXPERTS[1])
    for one in (model, routers):
        for parameter in one.parameters():
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    calls |= {"alone": partial(microbatch, model, model, False), "router": partial(route, routers)}
    model = network(EXPERTS[1])
    return calls | {"last": partial(microbatch, reduced(model), model, True)}


def reduced(model: nn.Module) -> nn.Module:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=True, use_distributed_optimizer=True
    )
    return DistributedDataParallel(model.config, config, model)


def microbatch(outer: Any, model: nn.Module, last: bool) -> list[float]:
    model.set_input_tensor(torch.randn(ROWS, 1, WIDTH, dtype=torch.bfloat16, requires_grad=True))
    if last:
        outer.zero_grad_buffer()
    with contextlib.nullcontext() if last or outer is model else outer.no_sync():
        times = passes(lambda: outer(None, None, None))
    if last:
        outer.finish_grad_sync()
    return times


def route(model: nn.Module) -> list[float]:
    """Norms and routers alone."""
    rows = torch.randn(ROWS, 1, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    times = [clock()]
    found = [layer.mlp.router(layer.pre_mlp_layernorm(rows))[0] for layer in model.decoder.layers]
    times.append(clock())
    torch.autograd.backward(found, [torch.zeros_like(one) for one in found])
    return [*times, clock()]


def parts(layer: dict[str, dict[str, float]], kind: str) -> dict[str, dict[str, float]]:
    """A layer's components by difference; experts by the line through counts of local ones."""
    names = ("attention", "router", "dense_ffn", "experts", "expert")
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for phase in PHASES:
        attention, router = layer[f"attention{kind}"][phase], layer["router"][phase]
        each, rest = linear_regression(EXPERTS, [layer[f"{n} experts{kind}"][phase] for n in EXPERTS])
        found["attention"][phase], found["router"][phase] = attention, router
        found["dense_ffn"][phase] = layer[f"dense{kind}"][phase] - attention
        found["experts"][phase], found["expert"][phase] = rest - attention - router, each
    return found


def begun(doc: str | None) -> tuple[Path, str]:
    """The arguments of a script of Transformer Engine's layers, and its Python without the compiled part in a
    fake group of RANKS: (where the result goes, the version of Megatron-Core)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sources", type=Path, nargs="+", required=True)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    te_extension.install(given.sources, VERSION)
    import megatron.core
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import moe_utils

    from reports.host.megatron_core import without_cuda

    torch.set_num_threads(1)
    product = moe_utils.te_general_gemm
    without_cuda()
    moe_utils.te_general_gemm, torch.cuda.is_available = product, lambda: True
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    mappings.dist_all_gather_func = partial(gathered, mappings.dist_all_gather_func)
    dist.all_to_all_single = partial(exchanged, dist.all_to_all_single)
    return given.json, megatron.core.__version__


def spread_experts() -> None:
    """All ranks have experts of their own, and data."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random as parallel_random

    parallel_state.initialize_model_parallel(1, 1, expert_model_parallel_size=RANKS)
    parallel_random.model_parallel_cuda_manual_seed(1)


def by_phase(took: dict[str, float], names: Iterable[str]) -> dict[str, dict[str, float]]:
    """Linears of a layer in each pass."""
    return {name: {phase: took[f"{name} {phase}"] / LAYERS for phase in PHASES} for name in names}


def written(target: Path, core: str, took: dict[str, float], found: dict[str, Any]) -> None:
    """The result, with what it was measured with."""
    head = {
        "unit": "forward passes of a torch Linear",
        "linear_us": took[UNIT] * 1e6,
        "torch": torch.__version__,
        "transformer_engine": VERSION,
        "megatron_core": core,
    }
    text = json.dumps(head | found, indent=2)
    target.write_text(text + "\n")
    print(text)


def main() -> None:
    target, core = begun(__doc__)
    from transformer_engine.common.recipe import MXFP8BlockScaling

    te_extension.eight_bits()
    spread_experts()
    calls = of_modules() | of_modules(MXFP8BlockScaling(), ", mxfp8") | of_layers()
    took = timed(calls)
    every = by_phase(took, calls)
    layer = {name: took for name, took in every.items() if "Linear" not in name and "Norm" not in name}
    found = {
        "modules": {name: took for name, took in every.items() if name not in layer},
        "layers": layer,
        "bf16": parts(layer, ""),
        "mxfp8": parts(layer, ", mxfp8"),
    }
    written(target, core, took, found)


if __name__ == "__main__":
    main()
