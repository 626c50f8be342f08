"""What the host does for layers made of Python modules: calls of modules, views, autograd's nodes, hooks,
and their kernels, in forward passes of a torch Linear, the unit of a profile's `host.cpu_launch_time`.

The numbers, what each is of and where it was measured are in host_costs.yaml.
"""

from typing import Any

from mopsim.common.shipped import shipped

Pair = tuple[float, float]
Costs = dict[str, Pair]


def _paired(found: Any) -> Any:
    """Lists as tuples, at any depth."""
    if isinstance(found, dict):
        return {key: _paired(value) for key, value in found.items()}
    return tuple(found) if isinstance(found, list) else found


_READ = _paired(shipped("mopsim.graph", "host_costs.yaml"))
LAYER: Costs = _READ["layer"]
LAYERS: dict[str, dict[bool, Costs]] = {
    "transformers": {False: LAYER, True: LAYER},
    "transformer_engine": {False: _READ["transformer_engine"], True: _READ["transformer_engine_8_bits"]},
    **{
        name: {False: _READ[name], True: _READ[name]}
        for name in ("mopexec", "compiled", "functional", "functional_compiled")
    },
}
"""By a stack's `host.layers`, and by whether products are in 8 bits."""
EXCHANGED: Costs = _READ["exchanged"]
ON_A_DEVICE: dict[str, float] = _READ["on_a_device"]
PERMUTED: Costs = _READ["permuted"]
TENSOR: Costs = _READ["tensor"]
DTENSOR: Costs = _READ["dtensor"]
DTENSOR_KINDS: Costs = _READ["dtensor_kinds"]
CONTEXT: dict[str, Costs] = _READ["context"]
DISPATCHERS: Costs = _READ["dispatchers"]
ROUTES_MAP: Pair = _READ["routes_map"]
LAUNCHES: Costs = _READ["launches"]
BIASES: Costs = _READ["biases"]
CLAMPS: Pair = _READ["clamps"]
WOVEN: dict[bool, Pair] = {False: _READ["woven"]["together"], True: _READ["woven"]["apart"]}
KINDS: Costs = _READ["kinds"]
MIXERS: dict[str, Costs] = _READ["mixers"]
"""By a stack's `host.layers`, of those that were measured, and by the kind of linear attention."""
DOCUMENTS: Costs = _READ["documents"]
_ORDERED = _READ["ordered"]
ORDERED: Pair = tuple(
    own + reads * _ORDERED["read"] for own, reads in zip(_ORDERED["piece"], _ORDERED["reads"], strict=True)
)
"""With the wait for what is read."""
UNFUSED: Pair = _READ["unfused"]
MODULES_AGAIN = {
    "core_attn": "core_attention", "layernorm": "norm", "moe_act": "activation",
    "mla_up_proj": "up-projections",
}  # fmt: skip
"""Of which modules (mopsim.graph.rewrites.recompute.MODULES) those of KINDS are that run again."""
CHECKPOINT: float = _READ["checkpoint"]
HOOKS: dict[bool | str, Costs] = {True: _READ["hooks"]["new"], "early": _READ["hooks"]["early"]}
GATHER: Pair = _READ["gather"]
REST: Pair = _READ["rest"]
FLAT: dict[bool | str, Costs] = {True: _READ["flat"]["whole"], "original": _READ["flat"]["original"]}
UPDATE, UPDATE_SHARDED = _READ["update"]
UPDATES: dict[str, dict[str, dict[str, float]]] = _READ["updates"]
UPDATE_MODEL, UPDATE_STEP = _READ["update_model"]
UPDATE_LOGS: Costs = _READ["update_logs"]
COLLECTION: float = _READ["collection"]
