"""The end of a step: global-norm clip, AdamW on the device, by the host or streamed through the device,
parameters gathered."""

from collections.abc import Sequence

from mopsim.common.units import DTYPE_BYTES
from mopsim.graph.host_costs import COLLECTION
from mopsim.graph.tape import Step
from mopsim.program.builder import Builder, state_stream, stream_of
from mopsim.program.context import Context
from mopsim.program.data_parallel import checked, gathering, scaled
from mopsim.program.stage import Stage
from mopsim.program.template import Memory
from mopsim.program.units import whole_numel
from mopsim.program.update_host import UpdateHost
from mopsim.program.workload import Work
from mopsim.spec.layout import Bucket, ceil_div, numel, optimizer_buckets

_O = "optimizer"
UPDATED = 28
"""Bytes of a parameter's update in fp32, at which profiles count it (adam_rate): it and two moments are read
and written, its gradient is read."""
NARROW = 3
"""What a number of 16 bits counts there in one kernel, where one of 32 counts its 4 bytes: torch's fused
AdamW on Llama 2 in bf16 takes 49.9 ms on H100 (pytorch pull request 117872; since torch 2.3, 126.6 before,
which is not simulated): taken for 6.74 billion parameters, 21 bytes of 2.83 TB/s each, where its adam_rate in
fp32 (assumed) is 28 at 2.86. Other programs' single kernels are taken to take as long."""
FOREACH = 13
"""Passes over a moment that torch's AdamW makes operation by operation beside one kernel's seven: 20 in eight
(torch/optim/adam.py, _multi_tensor_adam: mul, lerp, mul, addcmul, sqrt, div, add, addcdiv; so
_single_tensor_adam)."""
ROOTS = {"foreach": 1, "looped": 2}
"""Copies of second moments beside them: _multi_tensor_adam divides roots in place, _single_tensor_adam does
not."""
WIDENED, WIDENING = 8, 6
"""Bytes moved for each byte of a moment in 16 bits that is cast to fp32, back, and copied to its place, and
kernels of both moments (Transformer Engine 2.7, pytorch/optimizers/fused_adam.py, get_unscaled_state and
_apply_scale)."""
MASK, COUNTING = 2, 4
"""Bytes of the mask of a gradient that is not zero, written and read, and kernels of a tensor: the mask, its
sum, what is left of the tensor's elements, the sum of all (Megatron-Core, optimizer/clip_grads.py,
count_zeros_fp32; torch, TensorAdvancedIndexing.cpp, count_nonzero_cuda)."""


def moved(adamw: str, own: int, grad: int, moment: int) -> float:
    """What an update takes, as a part of one in fp32, of bytes of what is updated (the master, or a parameter
    that is its own), of its gradient, which is as wide at least, and of a moment.

    adamw: Kernels.adamw; what is not one kernel moves 16 bits in 2 bytes, in these passes as in FOREACH's.
    """
    narrow = NARROW if adamw == "fused" else 2
    update, last, state = (narrow if size < 4 else size for size in (own, max(grad, own), moment))
    return (2 * update + last + 4 * state) / UPDATED


class Update:
    """Of a stage whose layers autograd runs. All stages agree on the norm before any updates.

    away: parameters of each unit whose state is on the host; here: of the others.
    """

    def __init__(self, context: Context, builder: Builder, stage: Stage) -> None:
        self.c, self.b, self.stage = context, builder, stage
        strategy = context.strategy
        self.optimizer, self.dense = strategy.optimizer, strategy.dense
        self.moment = int(DTYPE_BYTES[strategy.precision.moments])
        self.own_master = context.own_master
        self.widens = context.widens
        self.numels = stage.updated
        self.away = [int(numel * stage.away) for numel in self.numels]
        self.here = [numel - away for numel, away in zip(self.numels, self.away, strict=True)]
        self.launches = max(1, len(stage.units) // 8)
        self.width = context.grad
        self.host = UpdateHost.of(context, stage)
        self.buckets = optimizer_buckets(self.away, self.optimizer.bucket_params)

    def run(self, reductions: Sequence[int]) -> None:
        """Ops after all gradients (`reductions`) are summed."""
        if work := scaled(self.c, self.stage.units, summed=True):
            ready = (*reductions, *self.b.tail())
            reductions = (self.b.add("scaled gradients", "compute", _O, _O, work, ready),)
        last = self._logged("zeros", self._clipped(reductions))
        if any(self.away):
            last = self._streamed(last) if self.optimizer.update_on == "device" else self._by_host(last)
        if any(self.here):
            last = self._on_device(last)
        self._over(self._logged("params_norm", last))

    def _logged(self, name: str, last: int) -> int:
        """What is read for a log alone (HostCosts.logs): gradients one by one, or what is updated at once."""
        if name not in self.c.stack.host.logs:
            return last
        held, host = sum(self.numels), self.host.logs.get(name, 0.0)
        if name == "zeros":
            work = self._copies(held * (self.width + MASK), host, COUNTING)
        else:
            work = self._passes(held * (self._master or self.c.param), host)
        return self.b.add(name, "compute", _O, _O, (work,), (last,), awaited=True)

    def _clipped(self, reductions: Sequence[int]) -> int:
        b, held = self.b, sum(self.numels)
        if self.dense.grad_tier == "device":
            b.spike(checked(self.c, sent=False) * min(held, self.stage.largest), "grads")
        self.width, ready = self._main_gradients(reductions)
        ready = self._tensors_agree(ready)
        ready = self._agreed(ready) if self.c.stack.sharding.agreements else ready
        host = 0.0 if self.width > self.c.grad else self.host.norm
        size = held * (self.c.stack.sharding.norm_passes or self.width)
        last = b.compute("norm", _O, _O, -1, [self._passes(size, host)], *ready)
        world, key = self.c.groups["world"], "norm" if self.stage.degree > 1 else ""
        sums = (Work("all_reduce", bytes=8.0, group=world),) if world.size > 1 else ()
        agreed = b.add("norm", stream_of(world, "world"), _O, _O, sums, (last,), (), key, awaited=True)
        return b.compute("clip", _O, _O, -1, [self._passes(2 * held * self.width, self.host.clip)], agreed)

    def _main_gradients(self, reductions: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Gradients as the update on the device reads them: (bytes of one, what the norm waits for).

        Narrow ones are copied as wide as the masters (`_copy_model_grads_to_main_grads`); those of a scaled
        fp16 loss are divided by the scale and searched for inf and nan, whose count the host reads
        (`_unscale_main_grads_and_check_for_nan`).
        """
        c, b, held = self.c, self.b, sum(self.numels if self.c.masters_stay else self.here)
        ready = (*reductions, *b.tail())
        if not self._master or not held:
            return c.grad, ready
        wide = self._master
        if c.grad < wide:
            work = (self._copies(held * (c.grad + wide), self.host.norm),)
            own, flat = self._flat
            memory = (
                ("grads", own - self._spared), ("grads", held * wide + flat), ("grads", -own - flat),
            )  # fmt: skip
            ready = (b.add("main gradients", "compute", _O, _O, work, ready, memory),)
        if c.strategy.precision.compute == "float16":
            work = (self._passes(2 * held * wide),)
            ready = (b.add("unscale", "compute", _O, _O, work, ready, awaited=True),)
        return max(c.grad, wide), ready

    def _tensors_agree(self, ready: tuple[int, ...]) -> tuple[int, ...]:
        """A tensor group sums the gradients of what each rank has whole (see Sharding.tensor_sums)."""
        c, b, sharding = self.c, self.b, self.c.stack.sharding
        group = c.groups["tensor"]
        if sharding.tensor_sums == "none" or group.size == 1:
            return ready
        held, copied = self._whole, sharding.tensor_sums == "copied"
        size = c.grad * (ceil_div(held, self.dense.fsdp) if copied else held)
        summed = Work("all_reduce", bytes=float(size), group=group)
        steps = [(stream_of(group, "tensor"), summed, 0)]
        if copied:
            on_host = self.dense.grad_tier == "host"
            there, back = (
                (way, Work(way, bytes=float(size))) if on_host else ("compute", self._passes(2 * size))
                for way in ("h2d", "d2h")
            )
            steps = [(*there, size), *steps, (*back, -size)]
        for stream, work, change in steps:
            memory = (("grads", change),) if change else ()
            ready = (b.add("whole gradients", stream, _O, _O, (work,), ready, memory),)
        return ready

    @property
    def _whole(self) -> int:
        """Parameters that each of several tensor-parallel ranks has whole."""
        c, stage = self.c, self.stage
        layers = {unit.layer for unit in stage.units if unit.layer >= 0} | ({-1} if stage.is_last else set())
        projection = c.stack.sharding.mtp_projection == "whole"
        return sum(whole_numel(c.model, layer, projection=projection) for layer in layers)

    def _agreed(self, ready: tuple[int, ...]) -> tuple[int, ...]:
        """What all ranks sum beside gradients (see Sharding.agreements)."""
        world, model = self.c.groups["world"], self.c.model
        if world.size > 1:
            for size in [8.0] + [4.0 * model.num_local_experts] * model.num_routers:
                work = (Work("all_reduce", bytes=size, group=world),)
                ready = (self.b.add("agree", stream_of(world, "world"), _O, _O, work, ready),)
        return ready

    @property
    def _master(self) -> int:
        """Bytes of a master weight beside the parameter, which a program without torch's fully_shard casts
        back in a kernel of its own (Megatron-LM, Float16OptimizerWithFloat16Params and DistributedOptimizer,
        `_copy_main_params_to_model_params`)."""
        return 0 if self.c.stack.sharding.fsdp else self.own_master

    @property
    def _moved(self) -> float:
        own = self.own_master or self.c.param
        return moved(self.c.stack.kernels.adamw, own, self.width, self.moment)

    def _passes(self, size: float, host: float = 0.0) -> Work:
        """Kernels of many tensors each. host: what the host does for them in all."""
        more = max(0.0, host - self.launches)
        return Work("memory_bound", bytes=float(size), launches=self.launches, host=more)

    def _copies(self, size: float, host: float, kernels: int = 1) -> Work:
        """Kernels of a tensor each, so many, where the program copies one by one."""
        tensors = self.host.tensors
        if not tensors:
            return self._passes(size, host)
        more = max(0.0, host - 1)
        return Work("memory_bound", bytes=float(size), launches=kernels * tensors, calls=1, host=more)

    def _on_device(self, last: int) -> int:
        c, b, params = self.c, self.b, sum(self.here)
        host = 0.0 if self.widens else max(0.0, self.host.update - 3 * self.launches)
        counted = float(params if self.widens else params * self._moved)
        works = [Work("optimizer", params=counted, launches=self.launches, host=host)]
        copies = ROOTS.get(c.stack.kernels.adamw, 0)
        roots = copies * self.moment * self._together(params)
        if roots:
            b.make("roots", roots, _O)
            works.append(self._passes(FOREACH * self.moment * params))
        if self.widens:
            b.make("moments in fp32", self._widened, _O)
            widened = params * 2 * WIDENED * self.moment
            works.append(self._copies(widened, self.host.update, WIDENING))
        waits = self.widens and self.host.waits
        last = b.compute("adamw", _O, _O, -1, works, last, awaited=waits)
        if roots:
            b.drop("roots")
        if self.widens:
            b.drop("moments in fp32")
        whole = self._master > (c.param if self.widens else 0)  # not what parameters lack
        return self._cast(params, last) if whole else last

    @property
    def _flat(self) -> tuple[int, int]:
        """Bytes of narrow gradients that are there while they are copied wide: as they were, where they are
        gone after; and put together first, one flat tensor at a time (DeepSpeed 0.17.6,
        runtime/zero/stage_1_and_2.py and stage3.py: flatten(averaged_gradients).to(dtype))."""
        if self.c.stack.sharding.zero_grad != "copied":
            return 0, 0
        held = sum(self.here)
        return self.c.grad * held * self.stage.frees_gradients, self.c.grad * self._together(held)

    @property
    def _spared(self) -> int:
        """Bytes of gradients that are not there beside their wide copies: narrow ones (Sharding.zero_grad),
        and copies of the tensors that are updated before or after (update_group)."""
        sharding, zero, held = self.c.stack.sharding, self.dense.zero, sum(self.here)
        if sharding.zero_grad == "copied" and self.stage.frees_gradients:
            return self.c.grad * sum(u.shard_numel if zero == 2 else u.padded for u in self.stage.units)
        return self._master * (held - self._together(held)) if sharding.update_group else 0

    def _together(self, params: int) -> int:
        """Parameters that are updated at a time: all (foreach), or a tensor."""
        group = int(self.c.stack.sharding.update_group)
        if group:
            return min(params, group) if self.dense.zero == 3 else params
        if self.c.stack.kernels.adamw == "foreach":
            return params
        units, zero = self.stage.units, self.dense.zero
        return max((-(-unit.largest // (unit.shard if zero else 1)) for unit in units), default=0)

    @property
    def _widened(self) -> int:
        """Bytes of moments in fp32: of experts, or of the rest, which are updated one after the other."""
        routed = [unit.component == "experts" for unit in self.stage.units]
        parts = [sum(n for n, mine in zip(self.here, routed, strict=True) if mine == part) for part in (0, 1)]
        return 2 * int(DTYPE_BYTES["float32"]) * max(parts)

    def _cast(self, params: int, last: int) -> int:
        """Masters to parameters; wide copies of their gradients are freed."""
        spared = self._spared - params * self._master
        memory = (("grads", spared),) if self.width > self.c.grad else ()
        work = (self._copies(params * (self._master + self.c.param), self.host.parameters),)
        return self.b.add(
            "parameters cast", "compute", _O, _O, work, (last,), memory, awaited=self.host.waits
        )

    def _over(self, last: int) -> None:
        """Parameters are whole again, gradients zero."""
        c, b, zero = self.c, self.b, self.dense.zero
        if zero and not c.shards_params and not c.strategy.overlap.param_gather:
            for _, sent in gathering(c, self.stage.units):
                name, stream, waits = "gather parameters", state_stream(sent), self.host.waits
                last = b.add(name, stream, _O, _O, (sent,), (last,), awaited=waits)
        if steps := c.stack.host.collections:
            collected = Work("memory_bound", launches=1, host=COLLECTION / steps)
            last = b.compute("garbage collected", _O, _O, -1, [collected], last)
        if not self.stage.frees_gradients:
            full = sum(u.shard_numel if zero >= 2 else u.padded for u in self.stage.units)
            zeroed = self._passes(full * c.grad, self.host.zero)
            b.compute("gradients zeroed", _O, _O, -1, [zeroed], last)

    def _adam(self, bucket: Bucket) -> list[Work]:
        """One bucket on the device; what comes and goes is spiked."""
        return [Work("optimizer", params=numel(bucket) * self._moved)]

    def _streamed(self, last: int) -> int:
        """H2D master, moments and gradients that are on the host | update | D2H, through `slots` slots."""
        b, sizes = self.b, [numel(bucket) for bucket in self.buckets]
        slots, count = min(self.optimizer.slots, len(sizes)), len(sizes)
        each = 2 * self.moment + self.own_master
        up_each = each + (self.c.grad if self.dense.grad_tier == "host" else 0)
        b.make("slots", slots * max(sizes) * up_each, "staging")
        free = [b.compute("slots", _O, _O, -1, [], last)] * slots
        up: dict[int, int] = {}
        for index, bucket in enumerate(self.buckets):
            for ahead in range(index, min(index + min(slots, 2), count)):
                if ahead not in up:
                    work = self._copy("h2d", sizes[ahead] * up_each, len(self.buckets[ahead]))
                    deps = (free[ahead % slots],)
                    up[ahead] = b.add(f"state {ahead} up", "h2d", _O, _O, work, deps)
            done = b.compute(f"adamw {index}", _O, _O, -1, self._adam(bucket), up[index])
            work = self._copy("d2h", sizes[index] * each, len(bucket))
            free[index % slots] = b.add(f"state {index} down", "d2h", _O, _O, work, (done,))
        last = b.compute("slots freed", _O, _O, -1, [], *free)
        b.drop("slots")
        return last

    def _copy(self, way: str, size: float, pieces: int) -> tuple[Work, ...]:
        launches = pieces * (2 + bool(self.own_master))
        return (Work(way, bytes=float(size), launches=launches, duplex=True),)

    def _by_host(self, last: int) -> int:
        """Gradients down one bucket ahead, AdamW on the host, parameters up; less what lives on the host."""
        b, buckets = self.b, self._host_buckets()
        down, before = [self._send(buckets[0], last)], last
        for index, bucket in enumerate(buckets):
            if index + 1 < len(buckets):
                down.append(self._send(buckets[index + 1], last))
            size = numel(bucket)
            work = (Work("host_optimizer", params=size, launches=len(bucket)),)
            deps = (down[index], last if last != before else None)
            last = b.add(f"host adamw {index}", "host", _O, _O, work, deps, self._on_host())
            if self.dense.param_tier == "device":
                each = self.c.masters_stay or self.c.param
                work = (Work("h2d", bytes=float(size * each), launches=len(bucket)),)
                last = b.add(f"parameters {index} up", "h2d", _O, _O, work, (last,))
        if self.c.masters_stay and self._master:
            last = self._cast(sum(self.away), last)
        return b.compute("updated", _O, _O, -1, [], last)

    def _host_buckets(self) -> list[Bucket]:
        """What goes down at a time: all."""
        return [[(0, 0, sum(self.away))]]

    def _on_host(self) -> Memory:
        """What is on the host while it updates, of what lives on the device: gradients, and parameters that
        go up, a buffer at a time: of the experts, of the others, and of those that a tensor group has whole
        where it sums their gradients, where it is not the masters that go up."""
        found: list[Step] = []
        if self.dense.grad_tier == "device":
            found.append(("host/grads", sum(self.away) * self._sent))
        if self.dense.param_tier == "device" and not self.c.masters_stay:
            units = list(zip(self.stage.units, self.away, strict=True))
            routed = sum(away for unit, away in units if unit.component == "experts")
            apart = self.c.stack.sharding.tensor_sums == "in_place" and self.c.groups["tensor"].size > 1
            whole = int(ceil_div(self._whole, self.dense.fsdp) * self.stage.away) if apart else 0
            together = max(routed, whole, sum(self.away) - routed - whole)
            found.append(("host/params", together * self.c.param))
        return (*found, *((category, -size) for category, size in found))

    @property
    def _sent(self) -> int:
        """Bytes of a gradient that goes to the host."""
        return max(self.c.grad, self.c.masters_stay)

    def _send(self, bucket: Bucket, after: int) -> int:
        """Gradients of a bucket go down."""
        if self.dense.grad_tier == "host":
            return after
        work = (Work("d2h", bytes=float(numel(bucket) * self._sent)),)
        return self.b.add("gradients to host", "d2h", _O, _O, work, (after,))
