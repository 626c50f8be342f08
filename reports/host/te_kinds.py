"""What other kinds of layers add to the host's time of Megatron-Core's layers of Transformer Engine.

    python -m reports.host.te_kinds --sources TransformerEngine/transformer_engine \\
        SITE_PACKAGES/megatron --json reports/host/te_kinds.json

As te_layers.py measures them, which tells how to install what it needs, each beside the plain layer in one
process, in turn: latent attention (MLA), rotary embedding that no kernel fuses, modules that are recomputed
(the norm is that before routers, experts are four of a rank), and alone, without the rest of a layer, shared
experts and routers with a bias and groups as DeepSeek-V3's. The fused rotary embedding of
MLA is a kernel of Triton's: two functions of one op each stand in.
"""

from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn

from reports.host import te_layers

ROUNDS, EXPERTS = 60, 4
LATENT: dict[str, Any] = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 8, "v_head_dim": 16,
    "num_query_groups": 4, "kv_channels": 16, "rope_type": "yarn",
}  # fmt: skip
SIGMOID: dict[str, Any] = {
    "moe_router_pre_softmax": True, "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True, "moe_router_topk_scaling_factor": 2.5,
    "moe_router_load_balancing_type": "seq_aux_loss",
}  # fmt: skip
AGAIN = {
    module: {"recompute_granularity": "selective", "recompute_modules": [module]}
    for module in ("core_attn", "layernorm", "moe_act", "mla_up_proj")
}
GROUPS: dict[str, Any] = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "latent": ("attention", LATENT),
    "latent rotary": ("latent", {"apply_rope_fusion": False}),
    "rotary": ("attention", {"apply_rope_fusion": False}),
    "sigmoid": ("router", SIGMOID),
    "groups": ("sigmoid", GROUPS),
    "core attention again": ("attention", AGAIN["core_attn"]),
    "norm again": ("layer", AGAIN["layernorm"]),
    "activation again": ("layer", AGAIN["moe_act"]),
    "up-projections again": ("latent", AGAIN["mla_up_proj"]),
}
"""Kind -> the layer that it is held against, and what it has other than that."""
PLAIN: dict[str, tuple[int, dict[str, Any]]] = {
    "attention": (0, {"bare": True}), "router": (EXPERTS, {"moe_router_topk": 4}),
    "layer": (EXPERTS, {"moe_router_topk": 4}),
}  # fmt: skip
ROUTERS = ("router", "sigmoid", "groups")
SHARED = {"moe_router_topk": 4, "moe_shared_expert_intermediate_size": 32}


def network(experts: int, more: dict[str, Any]) -> nn.Module:
    """te_layers' own; one with a latent size has the configuration and layers of MLA."""
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer import transformer_config

    if "kv_lora_rank" not in more:
        return te_layers.network(experts, **more)
    spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec
    config = transformer_config.MLATransformerConfig
    with (
        mock.patch.object(transformer_config, "TransformerConfig", config),
        mock.patch.object(
            gpt_layer_specs, "get_gpt_layer_with_transformer_engine_spec",
            lambda **given: spec(**given, multi_latent_attention=True),
        ),
    ):  # fmt: skip
        return te_layers.network(experts, **more)


class Rotated(torch.autograd.Function):
    """A kernel each way."""

    @staticmethod
    def forward(_: Any, rows: torch.Tensor) -> torch.Tensor:
        return rows.clone()

    @staticmethod
    def backward(_: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.clone()


class Split(torch.autograd.Function):
    """Keys and values in one kernel each way."""

    @staticmethod
    def forward(
        _: Any, rows: torch.Tensor, rotary: torch.Tensor, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return rows.new_empty((*rows.shape[:-1], width)), rows.new_empty((*rows.shape[:-1], width))

    @staticmethod
    def backward(_: Any, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return torch.cat((key[..., :8], value), -1), key[:, :, :1, 8:].contiguous(), None


def alone(model: Any) -> list[float]:
    """Shared experts alone."""
    rows = torch.randn(te_layers.ROWS, 1, te_layers.WIDTH, dtype=torch.bfloat16, requires_grad=True)
    times = [te_layers.clock()]
    found = [layer.mlp.shared_experts(rows) for layer in model.decoder.layers]
    times.append(te_layers.clock())
    torch.autograd.backward(found, [torch.zeros_like(one) for one in found])
    return [*times, te_layers.clock()]


def calls() -> dict[str, te_layers.Call]:
    wanted = dict(PLAIN)
    for name, (plain, more) in KINDS.items():
        wanted[name] = wanted[plain][0], wanted[plain][1] | more
    models = {name: network(*given) for name, given in wanted.items()}
    shared = network(EXPERTS, SHARED)
    for one in (*models.values(), shared):
        for parameter in one.parameters():
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    found: dict[str, te_layers.Call] = {
        name: partial(te_layers.route, model)
        if name in ROUTERS
        else partial(te_layers.microbatch, model, model, False)
        for name, model in models.items()
    }
    return found | {"shared experts": partial(alone, shared)}


def main() -> None:
    target, core = te_layers.begun(__doc__)
    te_layers.spread_experts()
    from megatron.core.transformer import multi_latent_attention

    multi_latent_attention.fused_apply_mla_rope_for_q = lambda rows, *_: Rotated.apply(rows)
    multi_latent_attention.fused_apply_mla_rope_for_kv = lambda rows, rotary, *_: Split.apply(
        rows, rotary, 16
    )
    made = calls()
    took = te_layers.timed(made, ROUNDS)
    every = te_layers.by_phase(took, made)
    added = {
        kind: {phase: every[kind][phase] - every[plain][phase] for phase in te_layers.PHASES}
        for kind, (plain, _) in KINDS.items()
    }
    added["shared experts"] = every["shared experts"]
    te_layers.written(target, core, took, {"layers": every, "added": added})


if __name__ == "__main__":
    main()
