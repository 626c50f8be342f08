"""What the host does for routed experts whose rows DeepEP's kernels send, beside the alltoall dispatcher's.

    git clone --depth 1 --branch v1.2.1 https://github.com/deepseek-ai/DeepEP
    PYTHONPATH=.:DeepEP python -m reports.host.te_deepep --sources TransformerEngine/transformer_engine \\
        SITE_PACKAGES/megatron --json reports/host/te_deepep.json

As te_layers.py measures them, which tells how to install what else it needs: the same layers in turn. What
arrives is turned into a map of experts by one kernel where Megatron-Core's experimental features are on, by
torch's own ops where they are off (`composed`), which is how they come. DeepEP's compiled module is stood in
for: what it does around its kernels is not in it.
"""

import sys
from functools import partial
from types import ModuleType
from typing import Any

import torch

from reports.host import te_extension, te_layers
from reports.host.te_layers import PHASES, ROWS

ROUNDS, EXPERTS, CHOSEN = 40, (4, 16), 2


class Runtime:
    """deep_ep_cpp.Buffer inside of a node; every kernel one op."""

    local = 0

    def __init__(self, *_: object) -> None:
        self.handle = torch.zeros(ROWS, dtype=torch.int32)

    def __getattr__(self, name: str) -> Any:
        return lambda *_: 1  # ids, handles and counts of ranks, before anything runs

    def get_dispatch_layout(self, *_: object) -> tuple[object, ...]:
        return self.handle.clone(), None, self.handle, self.handle, Anything()

    def intranode_dispatch(self, rows: Any, scales: Any, chosen: Any, weights: Any, *_: object) -> Any:
        out = torch.zeros_like(rows)
        if chosen is None:
            return (out, *[None] * 9, Anything())
        place = (torch.arange(ROWS) % self.local)[:, None]
        chosen = torch.cat([place, *[torch.full_like(place, -1)] * (CHOSEN - 1)], 1)
        counts = [ROWS // self.local] * self.local
        return out, None, chosen, torch.ones(ROWS, CHOSEN), counts, *[self.handle] * 5, Anything()

    def intranode_combine(self, rows: Any, weights: Any, *_: object) -> tuple[Any, Any, Any]:
        return torch.zeros_like(rows), None if weights is None else torch.zeros_like(weights), Anything()


class Anything:
    """A configuration or an event, which orders nothing."""

    def __init__(self, *_: object) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *_: 0


def install() -> None:
    made = ModuleType("deep_ep_cpp")
    vars(made).update(Buffer=Runtime, Config=Anything, EventHandle=Anything, topk_idx_t=torch.int64)
    sys.modules[made.__name__] = made


def microbatch(local: int, experimental: bool, outer: Any, model: Any) -> list[float]:
    from megatron.core.config import set_experimental_flag

    Runtime.local = local
    set_experimental_flag(experimental)
    return te_layers.microbatch(outer, model, False)


def main() -> None:
    install()
    target, core = te_layers.begun(__doc__)
    from megatron.core.fusions import fused_indices_converter as converter

    for name in ("_indices_to_multihot_kernel", "_multihot_to_indices_kernel"):
        setattr(converter, name, te_extension.Anything(name))
    te_layers.spread_experts()
    deepep: dict[str, Any] = {"moe_token_dispatcher_type": "flex", "moe_enable_deepep": True}
    kinds: dict[str, tuple[bool, dict[str, Any]]] = {
        "alltoall": (False, {}), "deepep": (True, deepep), "composed": (False, deepep)
    }  # fmt: skip
    calls: dict[str, te_layers.Call] = {}
    for local in EXPERTS:
        for kind, (experimental, more) in kinds.items():
            model = te_layers.network(local, **more)
            calls[f"{kind}, {local}"] = partial(
                microbatch, local, experimental, te_layers.reduced(model), model
            )
    took = te_layers.timed(calls, ROUNDS)
    every = te_layers.by_phase(took, calls)
    added = {
        f"{kind}, {local}": {
            phase: every[f"{kind}, {local}"][phase] - every[f"{beside}, {local}"][phase] for phase in PHASES
        }
        for kind, beside in (("deepep", "alltoall"), ("composed", "deepep"))
        for local in EXPERTS
    }
    te_layers.written(target, core, took, {"layers": every, "added": added})


if __name__ == "__main__":
    main()
