"""What the host does for layers made of Python modules: calls of modules, views, autograd's nodes, hooks,
and their kernels.

In forward passes of a torch Linear, the unit of a profile's `host.cpu_launch_time`. Measured on a CPU with
tiny tensors for transformers 5.24 and torch 2.13 by `reports/host/measure.py`, whose results
(`reports/host/modules.json`) these are, rounded; a test holds them together.
"""

Costs = dict[str, tuple[float, float]]

LAYER: Costs = {
    "attention": (64.0, 58.0),
    "router": (14.0, 14.0),
    "experts": (33.0, 25.0),
    "dense_ffn": (18.0, 26.0),
}
"""Linears of a component's forward and backward, kernels included. Megatron-Core's own modules, measured
likewise (`reports/host/megatron_core.json`): 165 a dense layer where these are 166, about 255 one with
experts where these are 208."""
TRANSFORMER_ENGINE: Costs = {
    "attention": (98.0, 44.0),
    "router": (35.0, 22.0),
    "experts": (136.0, 81.0),
    "expert": (2.3, 3.4),
    "dense_ffn": (41.0, 28.0),
}
TRANSFORMER_ENGINE_8_BITS: Costs = {
    "attention": (119.0, 52.0),
    "router": (35.0, 22.0),
    "experts": (152.0, 84.0),
    "expert": (6.2, 6.1),
    "dense_ffn": (44.0, 33.0),
}
"""The same of Megatron-Core 0.14's layers made of Transformer Engine 2.7's modules, in its data parallelism
(`reports/host/te_layers.json`), in bf16 and in MXFP8. `expert`: each local expert adds, whose weight is a
parameter of its own. Neither Triton's launches (LAUNCHES) nor cuBLASLt's choice of algorithms is in them."""
PERMUTED: Costs = {"layer": (11.0, 1.8), "expert": (0.37, 0.38)}
"""Linears that permutation by torch's own ops adds to these layers (the same file, `composed`), and for each
expert of all ranks, whose rows are split off and put elsewhere one after the other."""
TENSOR: Costs = {"attention": (10.1, 12.8), "dense_ffn": (8.4, 11.5), "shared_experts": (8.4, 11.5)}
"""Linears that a region of split products adds to them on tensor-parallel ranks, with its collectives' Python
(`reports/host/te_tensor.json`); routed experts that are not split themselves add none."""
DTENSOR: Costs = {"attention": (204.0, 290.0), "dense_ffn": (159.0, 256.0)}
"""The same of layers whose products torch's DTensor splits (parallelize_module;
`reports/host/dtensor.json`)."""
CONTEXT: dict[str, Costs] = {
    "ring": {"layer": (10.4, 13.5), "rank": (11.5, 7.8)},
    "all_gather": {"layer": (24.0, 32.1), "rank": (0.8, 1.7)},
    "ulysses": {"layer": (47.6, 49.8), "rank": (-0.2, -0.4)},
}
"""Linears that context-parallel ranks add to attention and each of them does, by how they exchange a sequence
(`reports/host/te_context.json`), with the kernels that put its parts together, without NCCL's start."""
DISPATCHERS: Costs = {"deepep": (-18.6, -15.6)}
LAUNCHES: Costs = {"alltoall": (31.5, 26.9), "deepep": (27.0, 16.7)}
"""Linears that Triton's launches of a fused permutation's kernels add (`reports/host/te_triton.json`): 13 and
7 a layer, most of which Triton tunes by itself and have some twenty arguments."""
BIASES: Costs = {"layer": (3.2, 14.2), "expert": (2.0, 4.7)}
CLAMPS = (8.1, 12.2)
"""Linears that a layer takes more with biases, each of its experts among them scaled by route weights and
added by torch, and with clamps before the gate (`reports/host/te_biases.json`)."""
ROUTES_MAP = (5.8, 2.8)
"""Linears that dispatching, experts and combining take more than with the alltoall dispatcher (HybridEP's are
taken for that one's), and where torch makes the map of routes (`reports/host/te_deepep.json`, the means of 4
and 16 local experts)."""
WOVEN: dict[bool, tuple[float, float]] = {False: (12.0, 23.2), True: (12.0, 31.3)}
"""Linears that a layer takes more where a forward is woven with another microbatch's backward: five graphs of
autograd in place of one; True: weight gradients made apart too (`host.delayed_grads`). Means of
`reports/host/te_overlap.json`; forward: of all four, whose forwards are the same. Streams and events are not
in it."""
KINDS: Costs = {
    "latent": (13.0, 15.2),
    "latent_rotary": (26.1, 17.7),
    "rotary": (16.2, 13.3),
    "shared_experts": (19.7, 15.8),
    "sigmoid": (8.1, 7.0),
    "groups": (10.4, 0.2),
    "core_attention_again": (0.6, 52.8),
    "norm_again": (-10.7, 29.3),
    "activation_again": (-8.0, 22.2),
    "up-projections_again": (-1.6, 50.9),
}
"""Linears that other kinds of these layers add (`reports/host/te_kinds.json`): latent attention, to attention
with norms of queries and keys; rotary embedding that no kernel fuses, without and with it; shared experts; a
router with sigmoids, a bias for each expert and balance by sequences, and one with groups too; the core of
attention, a norm, the experts' activation and MLA's up-projections that the backward runs again, whose second
forward is in it, and whose first has no graph."""
DOCUMENTS: Costs = {"rotary": (13.7, 10.0), "latent_rotary": (15.3, 13.0)}
"""Linears of such a rotary embedding that each document of a packed row adds where they are turned one after
the other (HostCosts.documents; `reports/host/te_packed.json`). Their kernels are not in the device's time."""
MODULES_AGAIN = {
    "core_attn": "core_attention",
    "layernorm": "norm",
    "moe_act": "activation",
    "mla_up_proj": "up-projections",
}
"""Of which modules (mopsim.graph.rewrites.recompute.MODULES) these are."""
LAYERS: dict[str, dict[bool, Costs]] = {
    "transformers": {False: LAYER, True: LAYER},
    "transformer_engine": {False: TRANSFORMER_ENGINE, True: TRANSFORMER_ENGINE_8_BITS},
}
"""By a stack's `host.layers`, and by whether products are in 8 bits."""
CHECKPOINT = 130.0
"""Linears of recomputing a layer (torch.utils.checkpoint, not reentrant) beside its second forward."""
HOOKS: dict[str, tuple[float, float]] = {
    "attention": (227.0, 210.0),
    "router": (38.0, 39.0),
    "experts": (23.0, 24.0),
    "dense_ffn": (105.0, 112.0),
}
"""Linears that the hooks of DeepSpeed's ZeRO-3 around every module add to a component's forward and backward
(`reports/host/deepspeed.json`). A recomputation is one more forward: 332 of a dense layer, 294 measured."""
GATHER, REST = (14.3, 1.5), (48.7, 1.6)
"""Linears of a group of FSDP2 and of each of its parameters: whenever it is gathered; and once in a forward
and backward, for hooks and the reduction."""
FLAT: dict[bool | str, dict[str, tuple[float, float]]] = {
    True: {"gather": (6.0, 0.1), "rest": (61.3, 1.3), "update": (4.7, 0.0)},
    "original": {"gather": (23.3, 0.8), "rest": (47.2, 2.9), "update": (4.4, 0.3)},
}
"""The same of a unit of FSDP1, and of clipping and updating it, by `sharding.flat`
(`reports/host/fsdp1.json`)."""
UPDATE, UPDATE_SHARDED = 1.2, 3.7
"""Linears for each parameter of clipping and a fused AdamW step, of tensors and of FSDP2's DTensors."""
UPDATES: dict[str, dict[str, dict[str, float]]] = {
    "transformer_engine": {
        "wide": {"norm": 0.65, "clip": 1.03, "update": 0.0, "parameters": 0.7, "zero": 0.15},
        "narrow": {"norm": 1.03, "clip": 1.03, "update": 0.0, "parameters": 0.7, "zero": 0.19},
        "aware": {"norm": 0.68, "clip": 1.06, "update": 1.6, "parameters": 0.0, "zero": 0.07},
    }
}
"""By whose modules the layers are (HostCosts.layers), where parameters are updated one by one: Linears for
each parameter of which a rank updates a part in Megatron-Core 0.14's DistributedOptimizer with Transformer
Engine 2.7's FusedAdam (`reports/host/te_optimizer.json`), by gradients in fp32 and in bf16, which are cast
one by one, and for moments in bf16 (the precision-aware optimizer). norm: gradients to main gradients, norm.
clip: that, and lists for AdamW. update: moments to fp32 and back. parameters: main parameters to parameters,
one copy each. zero: gradients that are let go."""
UPDATE_MODEL, UPDATE_STEP = 0.03, 20.0
"""The same for each parameter of the model, and of a step whatever their number."""
UPDATE_LOGS: dict[str, tuple[float, float]] = {"zeros": (3.0, 1.1), "params_norm": (50.0, 0.7)}
"""Of what its training loop counts for its log (HostCosts.logs), and for each parameter that a rank updates
(count_zeros_fp32; megatron/training/utils.py, calc_params_l2_norm)."""
COLLECTION = 27_000.0
"""Linears of one gc.collect() of a process that has imported torch, its compiler and transformers (520,000
objects, the same file): those of the programs are not in it."""
