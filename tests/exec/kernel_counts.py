"""How many kernels a step launches, counted without a device: ops of the planned device below autograd."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from mopexec.check.dry_run import _batches, _fake_platform
from mopexec.measure.scope import NOW
from mopexec.measure.torch_dispatch import EagerMode, plain_types, returns_alias, writes
from mopexec.run.apply import build
from mopsim.spec.plan import Plan

_FREE = frozenset(
    ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "record_stream",
     "_unsafe_view", "_reshape_alias")
)  # fmt: skip
"""Ops that allocate and launch nothing, and views that their schema does not tell."""

KERNELS = {
    "rms_norm_backward_": 8, "rotate_": 2, "swiglu_backward_": 3, "route_weights": 6,
    "route_weights_backward": 8, "add_routes_": 4, "take_routes_": 3, "take_weighted_": 4, "chunk_orders": 2,
    "arrival_order": 3, "rms_norm_strided": 3, "pack_routes": 6, "pack_back": 4, "rotate": 2,
    "ungated_backward_": 2, "layer_norm_strided": 4, "layer_norm_backward_": 11,
}  # fmt: skip
"""The most kernels of an op, where it is not one. Compiled: what Inductor (torch 2.13) makes of them for a
CPU, as torch._inductor.metrics counts; for a GPU it joins more loops and makes no more, which was not
measured."""


class KernelCounter(EagerMode):
    """Counts while entered. by_place: launches by (component, phase); by_op: by the op's name.

    An op counts as one launch, and a collective as one; a sort is one here and several on a card.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_place: Counter[tuple[str, str]] = Counter()
        self.by_op: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.by_op.total()

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        if not plain_types(types):
            return NotImplemented
        if launches(func) and not NOW.uncounted:
            self.by_place[NOW.component, NOW.phase] += 1
            self.by_op[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def launches(func: Any) -> bool:
    """Whether an op starts a kernel: not an allocation, and not a view."""
    name = func._schema.name.split("::")[-1]
    if name in _FREE or func.namespace == "prim":
        return False
    return bool(writes(func)) or not returns_alias(func)


def counted_step(plan: Plan) -> KernelCounter:
    """What one step of `plan` launches on the planned device, of ranks that route as the plan's profile."""
    with _fake_platform(plan, 0) as platform:
        runner, batches = build(plan, platform, routing="profile"), _batches(plan, platform)
        counter = KernelCounter()
        with counter:
            runner.step(batches)
        return counter


def layer_kernels(plan: Plan) -> Counter[tuple[str, str]]:
    """Launches of one layer, forward and backward, by (component, phase): those of a step with a layer
    more, less those of the plan's own; without its update. On tensors without data, as `dry_run`.
    """
    counts = []
    for layers in (plan.model.num_hidden_layers, plan.model.num_hidden_layers + 1):
        model = replace(plan.model, num_hidden_layers=layers)
        counts.append(counted_step(replace(plan, model=model)).by_place)
    found = Counter({place: count - counts[0][place] for place, count in counts[1].items()})
    return Counter({place: count for place, count in found.items() if count and place[1] in _LAYER})


_LAYER = ("forward", "recompute", "backward")
