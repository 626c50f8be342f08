"""What biases, and clamps before the gate, add to the host's time of Megatron-Core's layers with experts.

    git clone --depth 1 --branch core_v0.15.3 https://github.com/NVIDIA/Megatron-LM
    python -m reports.host.te_biases --sources TransformerEngine/transformer_engine \\
        Megatron-LM/megatron --json reports/host/te_biases.json

As te_layers.py measures them, which tells how to install what it needs: layers of GPT-OSS's kind, with its
gate alone and with biases too, beside plain ones in one process, by the number of a rank's experts. Compiled
functions run as they are; a copy to the device is one here too, but nothing waits for it.
"""

from functools import partial
from statistics import linear_regression, mean
from typing import Any

from reports.host import te_layers

BIASED: dict[str, Any] = {"add_bias_linear": True}
PLAIN: dict[str, Any] = {"bias_dropout_fusion": False, "moe_router_topk": 4}


def networks() -> dict[str, dict[str, Any]]:
    """What layers have other than te_layers' own, by kind."""
    from megatron.core.fusions.fused_bias_geglu import quick_gelu

    gate = {"activation_func": quick_gelu, "glu_linear_offset": 1.0, "activation_func_clamp_value": 7.0}
    return {"plain": PLAIN, "clamped": PLAIN | gate, "biased": PLAIN | gate | BIASED}


def parts(layer: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """What a layer takes more, clamps whatever the number of experts, biases by the line through it."""
    found: dict[str, dict[str, float]] = {"clamps": {}, "biases": {}, "bias": {}}
    for phase in te_layers.PHASES:
        plain, clamped, biased = (
            [layer[f"{n} experts, {kind}"][phase] for n in te_layers.EXPERTS]
            for kind in ("plain", "clamped", "biased")
        )
        found["clamps"][phase] = mean(clamped) - mean(plain)
        more = [one - other for one, other in zip(biased, clamped, strict=True)]
        found["bias"][phase], found["biases"][phase] = linear_regression(te_layers.EXPERTS, more)
    return found


def main() -> None:
    target, core = te_layers.begun(__doc__)
    te_layers.spread_experts()
    calls: dict[str, te_layers.Call] = {}
    for kind, more in networks().items():
        for n in te_layers.EXPERTS:
            model = te_layers.network(n, **more)
            calls[f"{n} experts, {kind}"] = partial(
                te_layers.microbatch, te_layers.reduced(model), model, False
            )
    took = te_layers.timed(calls)
    every = te_layers.by_phase(took, calls)
    te_layers.written(target, core, took, {"layers": every, "added": parts(every)})


if __name__ == "__main__":
    main()
