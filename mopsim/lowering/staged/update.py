"""The end of a stage's step: global-norm clip, AdamW on the device or a part of it on the host, parameters
gathered."""

from collections.abc import Sequence

from mopsim.common.units import DTYPE_BYTES
from mopsim.lowering.builder import stream_of
from mopsim.lowering.context import Context
from mopsim.lowering.staged.copies import update_host
from mopsim.lowering.staged.data_parallel import gathering, message_work
from mopsim.lowering.staged.issue import Issue
from mopsim.lowering.staged.stage import Stage
from mopsim.lowering.workload import Work
from mopsim.spec.layout import check_buckets

_O = "optimizer"


def update(c: Context, stage: Stage, issue: Issue, reductions: Sequence[int]) -> None:
    """Ops after all gradients (`reductions`) are summed. All stages agree on the norm before any updates."""
    strategy = c.strategy
    held = sum(u.shard_numel if strategy.dense.zero >= 1 else u.padded for u in stage.units)
    full = sum(u.shard_numel if strategy.dense.zero >= 2 else u.padded for u in stage.units)
    launches = max(1, len(stage.units) // 8)
    width, ready = _main_gradients(c, issue, held - int(held * stage.away), launches, reductions)
    ready = _agreed(c, issue, ready) if c.stack.sharding.agreements else ready
    work = (Work("memory_bound", bytes=float(held * width), launches=launches),)
    norm = issue.add("norm", "compute", _O, _O, work, ready)
    world = c.groups["world"]
    sums = (Work("all_reduce", bytes=8.0, group=world),) if world.size > 1 else ()
    key = "norm" if stage.degree > 1 else ""
    agreed = issue.add("norm", stream_of(world), _O, _O, sums, (norm,), (), key, awaited=True)
    work = (Work("memory_bound", bytes=2.0 * held * width, launches=launches),)
    last = issue.add("clip", "compute", _O, _O, work, (agreed,))
    away = int(held * stage.away)
    if away and strategy.optimizer.update_on == "device":
        last = _streamed(c, issue, away, last)
    elif away:
        last = _on_host(c, issue, away, last)
    if held > away:
        host = update_host(c, stage.units, 3 * launches)
        work = (Work("optimizer", params=float(held - away), launches=launches, host=host),)
        last = issue.add("adamw", "compute", _O, _O, work, (last,))
        if master := _master(c):
            work = (Work("memory_bound", bytes=float((held - away) * (master + c.param)), launches=launches),)
            memory = (("grads", -(held - away) * c.wide),) if width > c.grad else ()
            last = issue.add("parameters cast", "compute", _O, _O, work, (last,), memory)
    if strategy.dense.zero and not c.shards_params and not strategy.overlap.param_gather:
        for message in gathering(c, stage.units):
            last = issue.add(
                "gather parameters", stream_of(message[2]), _O, _O, message_work(message), (last,)
            )
    if not stage.frees_gradients:
        work = (Work("memory_bound", bytes=float(full * c.grad), launches=launches),)
        issue.add("gradients zeroed", "compute", _O, _O, work, (last,))


def _agreed(c: Context, issue: Issue, ready: tuple[int, ...]) -> tuple[int, ...]:
    """What all ranks sum beside gradients (see Sharding.agreements)."""
    world = c.groups["world"]
    if world.size == 1:
        return ready
    sizes = [8.0] + [4.0 * c.model.num_local_experts] * c.model.num_moe_layers
    for size in sizes:
        work = (Work("all_reduce", bytes=size, group=world),)
        ready = (issue.add("agree", stream_of(world), _O, _O, work, ready),)
    return ready


def _master(c: Context) -> int:
    """Bytes of a master weight beside the parameter, which a program without torch's fully_shard casts back
    in a kernel of its own (Megatron-LM, Float16OptimizerWithFloat16Params and DistributedOptimizer,
    `_copy_main_params_to_model_params`)."""
    master = c.strategy.precision.master
    if master == "param" or c.stack.sharding.fsdp:
        return 0
    return int(DTYPE_BYTES[master])


def _main_gradients(
    c: Context, issue: Issue, held: int, launches: int, reductions: Sequence[int]
) -> tuple[int, tuple[int, ...]]:
    """Gradients as the update of `held` parameters reads them: (bytes of one, what the norm waits for).

    Narrow ones are copied to fp32 (`_copy_model_grads_to_main_grads`); those of a scaled fp16 loss are
    divided by the scale and searched for inf and nan, whose count the host reads
    (`_unscale_main_grads_and_check_for_nan`).
    """
    ready = (*reductions, *issue.tail())
    if not _master(c) or not held:
        return c.grad, ready
    if c.grad < c.wide:
        work = (Work("memory_bound", bytes=float(held * (c.grad + c.wide)), launches=launches),)
        memory = (("grads", held * c.wide),)
        ready = (issue.add("main gradients", "compute", _O, _O, work, ready, memory),)
    if c.strategy.precision.compute == "float16":
        work = (Work("memory_bound", bytes=2.0 * held * c.wide, launches=launches),)
        ready = (issue.add("unscale", "compute", _O, _O, work, ready, awaited=True),)
    return max(c.grad, c.wide), ready


def _on_host(c: Context, issue: Issue, params: int, last: int) -> int:
    """Gradients down, AdamW on the host, parameters up, one after the other; less what lives on the host."""
    dense = c.strategy.dense
    if dense.grad_tier == "device":
        work = (Work("d2h", bytes=float(params * c.grad)),)
        last = issue.add("gradients to host", "d2h", _O, _O, work, (last,))
    last = issue.add("host adamw", "host", _O, _O, (Work("host_optimizer", params=float(params)),), (last,))
    if dense.param_tier == "host":
        return last
    work = (Work("h2d", bytes=float(params * c.param)),)
    return issue.add("parameters to device", "h2d", _O, _O, work, (last,))


def _streamed(c: Context, issue: Issue, params: int, last: int) -> int:
    """Master weights and moments through `slots` staging buckets: up, AdamW on the device, down."""
    precision, optimizer = c.strategy.precision, c.strategy.optimizer
    each = 2 * int(DTYPE_BYTES[precision.moments])
    each += 0 if precision.master == "param" else int(DTYPE_BYTES[precision.master])
    check_buckets(params, optimizer.bucket_params)
    bucket = min(params, optimizer.bucket_params)
    staging = optimizer.slots * bucket * each
    issue.add("staging", "compute", _O, _O, (), (last,), (("staging", staging),))
    down: list[int] = []
    for index, start in enumerate(range(0, params, bucket)):
        size = min(bucket, params - start)
        free = down[index - optimizer.slots] if index >= optimizer.slots else last
        copy = float(size * each)
        up = issue.add(
            "bucket up", "h2d", _O, _O, (Work("h2d", bytes=copy, launches=3, duplex=True),), (free,)
        )
        done = issue.add("bucket adamw", "compute", _O, _O, (Work("optimizer", params=float(size)),), (up,))
        down.append(
            issue.add(
                "bucket down", "d2h", _O, _O, (Work("d2h", bytes=copy, launches=3, duplex=True),), (done,)
            )
        )
    return issue.add(
        "staging freed", "compute", _O, _O, (), down[-optimizer.slots :], (("staging", -staging),)
    )
