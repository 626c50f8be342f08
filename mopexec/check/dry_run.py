"""One rank's memory at full scale, without the hardware: the executor's own step on tensors without data.

A fake process group of the plan's world size answers every collective at once, tensors have shapes and no
data, and the memory tracker counts them as it counts real ones. Routing follows the plan's profile.
flat_units runs on meta tensors; torch's fully_shard refuses a meta mesh and runs on fake CPU tensors, which
dispatch in Python and so take longer.
Not in it: communication buffers, workspaces of kernels, fragmentation.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mopexec.distributed.tiers import Platform
from mopexec.measure.fakes import QuickFakeMode
from mopexec.measure.program import PlayedOps
from mopexec.measure.scope import NOW, apart
from mopexec.measure.tracker import MemoryTracker, uncounted
from mopsim.common.errors import MopError, SpecError
from mopsim.spec import layout
from mopsim.spec.plan import Plan
from mopsim.spec.tensors import tensors

SHORT = 128  # tokens: tensors of a few elements a side come about without an attention matrix

MOST_ROUNDS = {"flat_units": 2_000_000, "fully_shard": 500_000, "split_modules": 2_000_000}
"""Rounds of a step's loops (`_check_length`): 4 to 20 minutes at the 1,700 to 7,800 a CPU second of
flat_units, 5 to 24 at the 350 to 1,600 of fully_shard. The lowest rates are of experts that a
CPU's plan runs one by one (layers of Qwen3-30B-A3B and Llama 3 8B on a shared core, 2026-12-01)."""
_LAYER_ROUNDS = 40  # a layer without its heads and experts takes as many ops


@dataclass(frozen=True)
class DryRunResult:
    """Bytes of one rank. resident: alive after build and one step; the peaks are over both.

    seconds: how long the dry run took, not a prediction.
    """

    rank: int
    peak_memory: int
    memory_by_category: dict[str, int]
    peak_component: str
    peak_phase: str
    resident_memory: int
    resident_by_category: dict[str, int]
    host_memory: int
    host_by_category: dict[str, int]
    num_ops: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The keys of `mopexec dry-run --json` (bytes and seconds)."""
        return {
            "rank": self.rank,
            "peak_memory_bytes": self.peak_memory,
            "memory_by_category_bytes": self.memory_by_category,
            "peak_at": {"component": self.peak_component, "phase": self.peak_phase},
            "resident_memory_bytes": self.resident_memory,
            "resident_by_category_bytes": self.resident_by_category,
            "host_memory_bytes": self.host_memory,
            "host_memory_by_category_bytes": self.host_by_category,
            "num_ops": self.num_ops,
            "seconds": self.seconds,
        }


def dry_run(
    plan: Plan,
    rank: int = 0,
    device_limit: int | None = None,
    host_limit: int | None = None,
    program: PlayedOps | None = None,
) -> DryRunResult:
    """Build `plan` and run one step of it as `rank`, optimizer included, on tensors without data. program:
    writes down the ops.

    Raises OutOfMemory at the allocation that crosses a limit (bytes), and MopError where an attention matrix
    of sequence x sequence appears or the step would run for hours. No process group may be initialised; none
    is left.
    """
    world_size = plan.strategy.world_size
    if not 0 <= rank < world_size:
        raise SpecError("rank", rank, f"must lie between 0 and {world_size - 1}")
    _check_length(plan)
    meta = plan.stack.runtime != "fully_shard"
    with apart(), _fake_platform(plan, rank) as platform:
        tracker = MemoryTracker(
            device_limit, host_limit, refuse=quadratic_guard(plan), meta=meta, device=platform.device
        )
        return tracked_step(plan, rank, platform, tracker, program)


@contextmanager
def _fake_platform(plan: Plan, rank: int) -> Iterator[Platform]:
    """A platform without data for the plan's runtime, in a process group of all its ranks."""
    fully_shard = plan.stack.runtime == "fully_shard"
    with fake_world(plan.strategy.world_size, rank), _fake_cpu() if fully_shard else nullcontext():
        yield Platform(torch.device("cpu" if fully_shard else "meta"), fake=True)


def _check_length(plan: Plan) -> None:
    """Refuse a step whose loops would be played for hours. Raises MopError that names their lengths."""
    model, strategy, training = plan.model, plan.strategy, plan.training
    microbatches, layers = training.num_microbatches(strategy), model.num_hidden_layers
    blocks = max(-(-training.seq_len // (model.window(layer) or training.seq_len)) for layer in range(layers))
    queries = model.num_attention_heads // model.num_key_value_heads * blocks
    experts = model.num_local_experts // strategy.experts.expert_parallel
    chunks = layout.num_chunks(
        training.tokens_per_rank(strategy), strategy.experts.chunk_tokens, strategy.experts.max_chunks
    )
    runtime = plan.stack.runtime
    rounds, most = microbatches * layers * (_LAYER_ROUNDS + queries + experts * chunks), MOST_ROUNDS
    if runtime and rounds > most[runtime]:
        raise MopError(
            f"plan: {microbatches:,} microbatches x {layers:,} layers x ({queries:,} query heads of a KV head"
            f" + {experts:,} experts of a rank x {chunks:,} chunks) are too many to play in a dry run of "
            f"{runtime}: {rounds:,} rounds, at most {most[runtime]:,}"
        )


def tracked_step(
    plan: Plan, rank: int, platform: Platform, tracker: MemoryTracker, program: PlayedOps | None = None
) -> DryRunResult:
    """Build `plan` and run one step under `tracker`, on whatever tensors and process group are in force.

    A dry run and a real run of this function are equal to the byte (tests/parity/test_dry_run.py).
    """
    from mopexec.run.apply import build

    begin = time.perf_counter()
    with tracker, program or nullcontext():
        runner = build(plan, platform, routing="profile", seed=plan.training.seed)
        if program is not None:
            program.begin_step()
        runner.step(_batches(plan, platform))
        resident, resident_by_category = tracker.memory, tracker.current_by_category
        del runner
    return DryRunResult(
        rank=rank,
        peak_memory=tracker.peak_memory,
        memory_by_category=tracker.memory_by_category,
        peak_component=tracker.peak_component,
        peak_phase=tracker.peak_phase,
        resident_memory=resident,
        resident_by_category=resident_by_category,
        host_memory=tracker.host_memory,
        host_by_category=tracker.host_by_category,
        num_ops=tracker.num_ops,
        seconds=time.perf_counter() - begin,
    )


@contextmanager
def fake_world(world_size: int, rank: int) -> Iterator[None]:
    """A default process group of `world_size` ranks in this one process, seen as `rank`, then destroyed."""
    import torch.distributed._tools.fake_collectives  # noqa: F401  (collectives on fake tensors)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a dry run needs the default process group for itself"
    devices = dist.Backend.backend_capability["fake"]
    if "meta" not in devices:
        devices.append("meta")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def quadratic_guard(plan: Plan) -> Callable[[Any, Tensor], None] | None:
    """Refuses what attention, or no component, makes of [..., S, S], S the sequence length: attention is to
    run in O(S) memory. Elsewhere such a shape is rows times the width of a weight.

    None where S is a side of a rank's attention or small, so that a shape cannot tell; where a kernel goes by
    rows of queries, of no more than a block of them.
    """
    length = plan.training.seq_len
    if length < SHORT or length <= _block(plan) or length in _attention_sides(plan):
        return None

    def refuse(func: Any, tensor: Tensor) -> None:
        shape = tensor.shape
        square = len(shape) >= 2 and shape[-1] == length and shape[-2] == length
        if square and NOW.category == "activations" and NOW.component in ("attention", "other"):
            raise MopError(f"attention: {func} makes a tensor {tuple(shape)}, sequence x sequence elements")

    return refuse


def _block(plan: Plan) -> int:
    """Rows of a product of attention by blocks of query rows: of all heads that share keys; 0: of others."""
    if plan.stack.running(plan.model, plan.strategy).attention != "rows":
        return 0
    return layout.ATTENTION_ROWS * plan.model.num_attention_heads // plan.model.num_key_value_heads


def _attention_sides(plan: Plan) -> set[int]:
    """Sides of what attention, and an MTP module around its layer, multiply and make, but for those of
    tokens: whole, of a tensor rank, and of one that has other heads of all tokens of a sequence (Ulysses).
    """
    model, strategy = plan.model, plan.strategy
    found = {model.num_attention_heads, model.num_key_value_heads, model.head_dim, model.head_dim // 2}
    found |= {model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim}
    for one in tensors(model):
        if one.layer >= 0 and one.component in ("attention", "vocabulary"):
            found |= set(one.shape)
    split = strategy.dense.tensor_parallel
    degrees = 1, split, split * strategy.attention.context_parallel
    return {side // degree for side in found for degree in degrees}


def _batches(plan: Plan, platform: Platform) -> list[Any]:
    """A step's microbatches as the data loader gives them: tokens and targets in tensors of their own."""
    from mopexec.run.runner import Batch

    shape = (plan.strategy.micro_batch, plan.training.seq_len // plan.strategy.attention.context_parallel)
    count = plan.training.num_microbatches(plan.strategy)

    def zeros() -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=platform.device)

    whole = ((plan.training.seq_len,),) * plan.strategy.micro_batch
    documents = whole if plan.training.attention_mask == "document" else ()  # one each: the most work
    return [Batch(zeros(), zeros(), 0, documents) for _ in range(count)]


@contextmanager
def _fake_cpu() -> Iterator[None]:
    """CPU tensors without data, for fully_shard.

    DTensor propagates shapes with fakes of global shape: memory that no rank ever has. In a real run they
    belong to another fake mode and show as meta tensors; here they look like the rank's own and are left out.
    """
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    name = "_propagate_tensor_meta_non_cached"
    original = getattr(ShardingPropagator, name)

    def unseen(*args: Any, **kwargs: Any) -> Any:
        with uncounted():
            return original(*args, **kwargs)

    setattr(ShardingPropagator, name, unseen)
    try:
        with QuickFakeMode():
            yield
    finally:
        setattr(ShardingPropagator, name, original)
