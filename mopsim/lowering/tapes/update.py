"""The end of a step: global-norm clip, then AdamW on the device, on the host, or streamed through it."""

from mopsim.common.units import DTYPE_BYTES
from mopsim.lowering.builder import Builder
from mopsim.lowering.context import Context
from mopsim.lowering.workload import Work
from mopsim.spec.layout import optimizer_buckets

_O = "optimizer"


def update(context: Context, builder: Builder, deps: list[int]) -> None:
    """Ops of the clip and of the optimizer, after all gradients (`deps`) are reduced."""
    builder.mark(-1)
    numels = [unit.shard_numel for unit in context.units()]
    total = sum(numels)
    norm = builder.add(
        "norm", "compute", "optimizer", "optimizer",
        (Work("memory_bound", bytes=float(total * context.grad), launches=2 * len(numels)),), deps=deps,
    )  # fmt: skip
    agreed = builder.collective(
        "norm", "all_reduce", 8, context.groups["world"], "optimizer", "optimizer", deps=(norm,)
    )
    builder.add(
        "clip", "compute", "optimizer", "optimizer",
        (Work("memory_bound", bytes=2.0 * total * context.grad, launches=len(numels)),), deps=(agreed,),
    )  # fmt: skip
    optimizer = context.strategy.optimizer
    fraction = optimizer.host_fraction if optimizer.state_tier == "host" else 0.0
    away = [int(numel * fraction) for numel in numels]
    here = total - sum(away)
    if here:
        work = (Work("optimizer", params=here, launches=len(numels)),)
        builder.add("adamw", "compute", "optimizer", "optimizer", work)
    if not any(away):
        return
    if optimizer.update_on == "host":
        _on_host(context, builder, sum(away))
    else:
        _streamed(context, builder, away)


def _on_host(context: Context, builder: Builder, total: int) -> None:
    """Gradients down, AdamW on the host, parameters up: nothing overlaps within one shard."""
    after = len(builder.ops) - 1
    dense = context.strategy.dense
    if dense.grad_tier == "device":
        work = (Work("d2h", bytes=float(total * context.grad)),)
        after = builder.add("gradients to host", "d2h", "optimizer", "optimizer", work, deps=(after,))
    after = builder.add(
        "host adamw", "host", "optimizer", "optimizer", (Work("host_optimizer", params=total),), deps=(after,)
    )
    if dense.param_tier == "device":
        work = (Work("h2d", bytes=float(total * context.param)),)
        after = builder.add("parameters to device", "h2d", "optimizer", "optimizer", work, deps=(after,))
    builder.add("updated", "compute", "optimizer", "optimizer", deps=(after,))


def _streamed(context: Context, builder: Builder, numels: list[int]) -> None:
    """Buckets through `slots` staging slots: master and moments (and gradients that are on the host) up |
    AdamW | master and moments down."""
    precision, optimizer = context.strategy.precision, context.strategy.optimizer
    own_master, gradient = precision.master != "param", context.strategy.dense.grad_tier == "host"
    state = 2 * int(DTYPE_BYTES[precision.moments])
    state += int(DTYPE_BYTES[precision.master]) if precision.master != "param" else 0
    each = state + gradient * context.grad
    buckets = optimizer_buckets(numels, optimizer.bucket_params)
    sizes = [sum(stop - start for _, start, stop in bucket) for bucket in buckets]
    staging = optimizer.slots * max(sizes) * each
    builder.add("staging", "compute", _O, _O, memory=(("staging", staging),))
    first = len(builder.ops) - 1
    down: list[int] = []
    for index, (bucket, size) in enumerate(zip(buckets, sizes, strict=True)):
        free = down[index - optimizer.slots] if index >= optimizer.slots else first
        pieces = len(bucket)
        copies = Work(
            "h2d", bytes=float(size * each), launches=(2 + own_master + gradient) * pieces, duplex=True
        )
        up = builder.add(f"bucket {index} up", "h2d", _O, _O, (copies,), deps=(free,))
        step = Work("optimizer", params=size, launches=pieces)
        done = builder.add(f"bucket {index} adamw", "compute", _O, _O, (step,), deps=(up,))
        copies = Work("d2h", bytes=float(size * state), launches=(2 + own_master) * pieces, duplex=True)
        down.append(builder.add(f"bucket {index} down", "d2h", _O, _O, (copies,), deps=(done,)))
    freed = (("staging", -staging),)
    builder.add("staging freed", "compute", _O, _O, memory=freed, deps=down[-optimizer.slots :])
