"""One rank of the fully_shard parity tests: runs every case for its world size and says what differed."""

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from mopexec.distributed.tiers import Platform
from mopexec.measure.tracker import MemoryTracker
from mopexec.model import Routing, Transformer
from mopexec.model.auxiliary import Auxiliary
from mopexec.run import apply
from mopexec.run.runner import Batch
from mopexec.weights.load import fill
from mopexec.weights.source import Seeded
from mopsim import strategies
from mopsim.spec import layout
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import Plan
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from tests import plans
from tests.exec.flat_parity import decay_groups
from tests.exec.spawn import end_groups

STEPS, SEQ, SEED = 2, 16, 3
TRACKED = ("everything", "boundaries_on_host")
SPLIT_INSIDE = "experts_split_inside"  # 3 experts on 2 replicas: each is split on its second dimension
MODEL = ModelSpec(
    name="tiny", hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8,
    vocab_size=37, intermediate_size=22, first_k_dense_replace=1, num_local_experts=8, num_experts_per_tok=2,
    moe_intermediate_size=12, shared_expert_intermediate_size=6, qk_norm="head",
)  # fmt: skip


def cases(world: int) -> dict[str, tuple[Strategy, str]]:
    """Strategy and routing of every case, by name."""

    def make(**options: Any) -> Strategy:
        return strategies.fsdp2(world, **{"dtype": "float64", "recompute": "none", **options})

    if world == 8:
        whole = make(
            fsdp=4, expert_parallel=4, context_parallel=2, recompute="full", loss="chunked",
            loss_chunk_tokens=5, offload=True,
        )  # fmt: skip
        return {"everything_skewed": (whole, "95/4")}
    pair = min(world, 2)
    everything: dict[str, Any] = {
        "expert_parallel": pair, "context_parallel": pair, "recompute": "full", "loss": "chunked",
        "loss_chunk_tokens": 5,
        "offload": True,
    }  # fmt: skip
    found = {}
    if world < 4:  # on four and eight ranks everything is in sharded_plans
        found = {
            "everything": (make(**everything, prefetch=2), "learned"),
            "everything_skewed": (make(**everything), "60/3"),
            "everything_float32": (make(**everything, dtype="float32"), "learned"),
            "bfloat16": (make(**everything, dtype="bfloat16"), "learned"),
            "zero2": (make(reshard_after_forward=False), "learned"),
            "boundaries_on_host": (
                plans.changed(
                    make(recompute="full", micro_batch=2, prefetch=0), activations={"layer_inputs": "host"}
                ),
                "learned",
            ),
        }  # fmt: skip
    if world == 4:
        found = {
            "hsdp": (make(fsdp=2), "learned"),
            "experts_strided": (
                plans.changed(
                    make(expert_parallel=2, recompute="full"), experts={"rank_placement": "strided"}
                ),
                "60/3",
            ),
            SPLIT_INSIDE: (make(expert_parallel=2, recompute="full"), "learned"),
            "experts_replicated": (
                plans.changed(make(expert_parallel=2), experts={"expert_fsdp": 1}),
                "learned",
            ),
        }
    return found


def plan_of(strategy: Strategy, routing: str, model: ModelSpec = MODEL) -> Plan:
    microbatches = 2 if strategy.world_size > 2 else 3  # the first, on two ranks one between, the last
    batch = microbatches * strategy.data_groups * strategy.micro_batch
    training = TrainSpec(
        seq_len=SEQ, global_batch=batch, clip_norm=0.05, weight_decay=0.1, learning_rate=1e-2,
        routing="balanced" if routing == "learned" else routing, bias_update_rate=1e-3,
    )  # fmt: skip
    return plans.plan_of(model, strategy, training)


def batches_of(plan: Plan, tokens: Tensor, rank: int) -> list[Batch]:
    """This rank's microbatches of tokens [global_batch, S + 1]."""
    strategy = plan.strategy
    groups = layout.groups(
        strategy.world_size, strategy.attention.context_parallel, strategy.attention.rank_placement
    )
    data = next(i for i, group in enumerate(groups) if rank in group)
    place, part = groups[data].index(rank), SEQ // strategy.attention.context_parallel
    found = []
    for index in range(plan.training.num_microbatches(strategy)):
        first = (index * len(groups) + data) * strategy.micro_batch
        rows = tokens[first : first + strategy.micro_batch, place * part : (place + 1) * part + 1]
        found.append(Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()))
    return found


class Reference:
    """The single-device model under the same optimizer step."""

    def __init__(self, plan: Plan, routing: str) -> None:
        strategy, self.plan = plan.strategy, plan
        profile = (
            Routing()
            if routing == "learned"
            else Routing(routing, strategy.micro_batch, strategy.attention.context_parallel)
        )
        self.model = Transformer(plan.model, getattr(torch, strategy.precision.param), "cpu", profile)
        self.model.set_auxiliary(Auxiliary.of(plan.training))
        fill(self.model, Seeded(SEED))
        t = plan.training
        self.optimizer = torch.optim.AdamW(
            decay_groups(self.model, t.weight_decay), lr=t.learning_rate, betas=(t.beta1, t.beta2), eps=t.eps
        )

    def step(self, tokens: Tensor) -> tuple[float, float, dict[str, Tensor]]:
        self.optimizer.zero_grad()
        scale = 1 / (tokens.shape[0] * SEQ)
        loss = self.model.loss(tokens[:, :-1], tokens[:, 1:], scale=scale)
        loss.backward()
        grads = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.training.clip_norm)
        self.optimizer.step()
        self.model.update_balance(self.plan.training.bias_update_rate)
        return loss.item(), norm.item(), grads


def run_case(name: str, strategy: Strategy, routing: str, rank: int) -> dict[str, float]:
    """On the first rank, the largest relative differences from the single-device model over STEPS steps; and,
    of cases of TRACKED, the memory tracked in them."""
    model = msgspec.structs.replace(MODEL, num_local_experts=6) if name == SPLIT_INSIDE else MODEL
    plan = plan_of(strategy, routing, model)
    reference = Reference(plan, routing) if rank == 0 else None
    tracker = MemoryTracker()
    watched = tracker if name in TRACKED else nullcontext()
    with watched:
        runner = apply.build(
            plan,
            Platform.detect(),
            routing="learned" if routing == "learned" else "profile",
            seed=SEED,
        )
    generator = torch.Generator().manual_seed(1)
    result = {"loss": 0.0, "norm": 0.0, "gradients": 0.0, "parameters": 0.0}
    for _ in range(STEPS):
        tokens = torch.randint(
            0, MODEL.vocab_size, (plan.training.global_batch, SEQ + 1), generator=generator
        )
        with watched:
            mine = runner.step(batches_of(plan, tokens, rank))
        gradients = runner.full_gradients()
        if reference is None:
            continue
        loss, norm, grads = reference.step(tokens)
        assert norm > plan.training.clip_norm, "clipping must be active"
        result["loss"] = max(result["loss"], abs(mine.loss - loss) / abs(loss))
        result["norm"] = max(result["norm"], abs(mine.grad_norm - norm) / norm)
        result["gradients"] = max(result["gradients"], difference(gradients, grads))
    parameters = runner.full_parameters()
    if reference is None:
        return {}
    result["parameters"] = difference(parameters, dict(reference.model.named_parameters()))
    biases = [
        (a, b)
        for (_, a), (_, b) in zip(runner.model.named_buffers(), reference.model.named_buffers(), strict=True)
    ]
    result["balance"] = max(float((a.cpu() - b).abs().max()) for a, b in biases)
    result |= {f"resident.{name}": size for name, size in tracker.current_by_category.items()}
    result |= {f"host.{name}": size for name, size in tracker.host_by_category.items()}
    result |= {f"peak.{name}": size for name, size in tracker.memory_by_category.items()}
    return result | {"peak": tracker.peak_memory}


def resumed(directory: Path, rank: int, world: int) -> dict[str, float]:
    """Difference of a step after a checkpoint from the same step of a new model that read the checkpoint."""
    strategy, routing = cases(world)["everything"]
    plan = plan_of(strategy, routing)
    tokens = torch.randint(
        0, MODEL.vocab_size, (plan.training.global_batch, SEQ + 1), generator=torch.Generator().manual_seed(2)
    )
    batches = batches_of(plan, tokens, rank)
    runner = apply.build(plan, Platform.detect(), seed=SEED)
    runner.step(batches)
    dcp.save(runner.state_dict(), checkpoint_id=str(directory))
    runner.step(batches)
    expected = runner.full_parameters()
    other = apply.build(plan, Platform.detect(), seed=SEED + 1)
    state = other.state_dict()
    dcp.load(state, checkpoint_id=str(directory))
    other.load_state_dict(state)
    other.step(batches)
    return {"parameters": difference(other.full_parameters(), expected)}


def difference(mine: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Largest |difference| of any tensor, relative to that tensor's largest element; the names must agree."""
    assert mine.keys() == reference.keys(), mine.keys() ^ reference.keys()
    worst = 0.0
    for name, expected in reference.items():
        assert mine[name].shape == expected.shape, (name, mine[name].shape, expected.shape)
        scale = max(float(expected.detach().abs().max()), 1e-30)
        worst = max(worst, float((mine[name].cpu() - expected.detach()).abs().max()) / scale)
    return worst


def run_cases(platform: Platform, world: int, folder: Path) -> dict[str, dict[str, float]]:
    """What `run_case` finds of every case, on this rank of a pool; on two, what differs after a checkpoint
    too."""
    rank = dist.get_rank()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {}
        for name, (strategy, routing) in cases(world).items():
            found[name] = run_case(name, strategy, routing, rank)
            end_groups()
        return found | ({"resumed": resumed(folder, rank, world)} if world == 2 else {})
