"""What layers with a linear attention take of the host, made of Transformer Engine's modules.

    pip install --no-deps --target FOLDER triton==3.4.0
    pip install --no-deps megatron-core==0.16.1 fla-core==0.4.1
    git clone --depth 1 --branch v2.2.6.post3 https://github.com/state-spaces/mamba
    git clone --depth 1 --branch v1.5.3 https://github.com/Dao-AILab/causal-conv1d
    TRITON=FOLDER python -m reports.host.te_linear --sources TransformerEngine/transformer_engine \\
        SITE_PACKAGES/megatron SITE_PACKAGES/fla mamba/mamba_ssm causal-conv1d/causal_conv1d \\
        --json reports/host/te_linear.json

As te_layers.py measures them, which tells how to install what else it needs: layers of Megatron-Core's
MambaMixer and GatedDeltaNet, whole recomputed ones too (its stack of mixed layers recomputes none), and
MambaMixers whose sequence lies on ranks, beside those of softmax attention in one process, in turn. Triton's
kernels are launched by its own Python and by a driver that starts nothing, as te_triton.py
has it; of each kernel's configurations the first is the fastest, so that no others are compiled. The
convolution's compiled module is one op of torch a kernel.
"""

import os
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from statistics import mean
from types import ModuleType
from typing import Any

import torch
from torch import nn

from reports.host import te_layers, te_triton
from reports.host.te_layers import LAYERS, PHASES

ROUNDS, RANKS = 30, (2, 4)
AGAIN = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MAMBA = {"mamba_state_dim": 16, "mamba_head_dim": 16, "mamba_num_groups": 2, "mamba_num_heads": 4}
DELTA: dict[str, Any] = {
    "experimental_attention_variant": "gated_delta_net", "linear_attention_freq": [1] * LAYERS,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
started = 0


class Driver(te_triton.Driver):
    """Compiles the first configuration of a kernel alone."""

    def get_benchmarker(self) -> Any:
        return lambda *_, **__: [1.0, 1.0, 1.0]


def convolved(out: int, *given: Any) -> None:
    """A kernel of the convolution."""
    global started
    started += 1
    given[out].zero_()


def install() -> None:
    """Triton with a driver, and packages whose __init__ would import what no mixer needs."""
    sys.path.append(os.environ["TRITON"])  # not before: torch would import it
    import megatron.core
    import triton

    triton.runtime.driver.set_active(Driver())
    torch.cuda.get_device_name = lambda *_: "NVIDIA H100"
    place = megatron.core.__path__[0].removesuffix("/megatron/core")
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "fla", "fla.modules"):
        package = ModuleType(name)
        package.__path__ = [f"{place}/{name.replace('.', '/')}"]
        package.__spec__ = ModuleSpec(name, None, is_package=True)
        package.__version__ = "0"  # type: ignore[attr-defined]
        sys.modules[name] = package
    cuda: Any = ModuleType("causal_conv1d_cuda")
    cuda.causal_conv1d_fwd, cuda.causal_conv1d_bwd = partial(convolved, 5), partial(convolved, 7)
    sys.modules[cuda.__name__] = cuda


def configured(more: dict[str, Any]) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(**(te_layers.usual() | more))


def hybrid(symbol: str, **more: Any) -> nn.Module:
    """Layers of one kind in Megatron-Core's stack of mixed ones."""
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
    from megatron.core.models.mamba.mamba_model import MambaModel

    model = MambaModel(config=configured(MAMBA | {"qk_layernorm": False} | more),
                       mamba_stack_spec=mamba_stack_spec, vocab_size=128, max_sequence_length=128,
                       hybrid_override_pattern=symbol * LAYERS, pre_process=False,
                       post_process=False)  # fmt: skip
    return model.to(torch.bfloat16).train()


def delta(**more: Any) -> nn.Module:
    """Layers of a gated delta rule, without their feed-forward."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
        get_transformer_block_with_experimental_attention_variant_spec as block_of,
    )
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp

    config = configured(DELTA | more)
    block = block_of(config)
    for layer in block.layer_specs:
        layer.submodules.mlp = layer.submodules.pre_mlp_layernorm = IdentityOp
        layer.submodules.mlp_bda = IdentityFuncOp
    model = GPTModel(config=config, transformer_layer_spec=block, vocab_size=128, max_sequence_length=128,
                     position_embedding_type="rope", pre_process=False, post_process=False)  # fmt: skip
    return model.to(torch.bfloat16).train()


def on_ranks(ranks: int) -> nn.Module:
    """Mixers whose sequence lies on so many ranks, which exchange it for heads."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random as parallel_random

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(1, 1, context_parallel_size=ranks)
    parallel_random.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    return hybrid("M", context_parallel_size=ranks, mamba_num_heads=8, mamba_num_groups=4)


def main() -> None:
    global started
    target, core = te_layers.begun(__doc__)
    te_layers.spread_experts()
    install()
    models = {
        "attention": te_layers.network(bare=True),
        "hybrid's attention": hybrid("*"),
        "mamba2": hybrid("M"),
        "gated_delta": delta(),
        "attention again": te_layers.network(bare=True, **AGAIN),
        "gated_delta again": delta(**AGAIN),
    }
    models |= {f"mamba2 on {ranks}": on_ranks(ranks) for ranks in RANKS}
    calls: dict[str, te_layers.Call] = {}
    launches: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        calls[name] = partial(te_layers.microbatch, te_layers.reduced(model), model, False)
        calls[name]()
        te_triton.Driver.launches = started = 0
        calls[name]()
        launches[name] = {"triton": te_triton.Driver.launches / LAYERS, "convolution": started / LAYERS}
    took = te_layers.timed(calls, ROUNDS)
    every = te_layers.by_phase(took, calls)
    added = {
        kind: {phase: every[kind][phase] - every["attention"][phase] for phase in PHASES}
        for kind in ("hybrid's attention", "mamba2", "gated_delta")
    }
    added["context"] = {
        phase: mean(every[f"mamba2 on {ranks}"][phase] for ranks in RANKS) - every["mamba2"][phase]
        for phase in PHASES
    }
    te_layers.written(target, core, took, {"layers": every, "launches": launches, "added": added})


if __name__ == "__main__":
    main()
