"""What one rank does in tests of single pieces of flat_units."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from mopexec.check.dry_run import DryRunResult, tracked_step
from mopexec.distributed.mesh import Group
from mopexec.distributed.tiers import Platform
from mopexec.measure.tracker import MemoryTracker
from mopexec.operators.dispatch import ChunkExchange
from mopexec.operators.grouped import expert_order
from mopexec.run import apply
from mopsim.spec.plan import Plan
from mopsim.spec.routing import routing_counts
from tests.exec.flat_parity import make_tokens, my_batches


def dispatch_and_combine(platform: Platform, routing: str, num_experts: int) -> bool:
    """Whether rows that go to their experts' ranks and straight back arrive as they left, in both pipelines'
    layouts.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    group = Group(tuple(range(world)), rank, dist.group.WORLD)
    local = num_experts // world
    counts = [list(routing_counts(routing, 13 + 2 * r, 2, 1, num_experts, 3)) for r in range(world)]
    receive = [c[rank * local : (rank + 1) * local] for c in counts]
    of_experts = expert_order(torch.tensor(receive, device=platform.device), sum(map(sum, receive)))
    none = torch.empty(0)
    exchange = ChunkExchange(group, counts[rank], receive, of_experts, none, none)
    expert = torch.repeat_interleave(torch.arange(num_experts), torch.tensor(counts[rank]))
    rows = torch.stack((expert, torch.full_like(expert, rank), torch.arange(expert.numel())), dim=1).double()
    rows = rows.to(platform.device)
    arrived = exchange.start(rows).take()
    mine = torch.repeat_interleave(torch.arange(local), torch.tensor(exchange.counts)) + rank * local
    sorted_by_expert = torch.equal(arrived[:, 0].cpu(), mine.double())
    numbers = arrived[:, 2] + 0.5
    weighted, back_numbers = exchange.start_back([arrived.clone()], numbers).take_weighted()
    back = exchange.start_back([arrived]).take()
    whole = torch.equal(weighted, rows) and torch.equal(back_numbers, rows[:, 2] + 0.5)
    return sorted_by_expert and whole and torch.equal(back, rows)


def tracked(platform: Platform, plan: Plan) -> DryRunResult:
    """A real step under the tracker, as the dry run makes it."""
    return tracked_step(plan, int(os.environ["RANK"]), platform, MemoryTracker())


def _outcome(plan: Plan, runner: object, step: int) -> tuple[float, dict[str, Tensor]]:
    rank = int(os.environ["RANK"])
    batches = my_batches(plan, make_tokens(plan, step), rank, torch.device("cpu"))
    loss = runner.step(batches).loss  # type: ignore[attr-defined]
    return loss, runner.full_parameters()  # type: ignore[attr-defined]


def train_and_save(platform: Platform, plan: Plan, path: Path) -> tuple[float, dict[str, Tensor]]:
    """One step, a checkpoint, and the (loss, weights) of one more step."""
    runner = apply.build(plan, platform, seed=7)
    _outcome(plan, runner, 0)
    dcp.save(runner.state_dict(), checkpoint_id=str(path))
    return _outcome(plan, runner, 1)


def load_and_train(platform: Platform, plan: Plan, path: Path) -> tuple[float, dict[str, Tensor]]:
    """(loss, weights) of the step after the checkpoint, from other initial weights."""
    runner = apply.build(plan, platform, seed=8)
    state = runner.state_dict()
    dcp.load(state, checkpoint_id=str(path))
    runner.load_state_dict(state)
    return _outcome(plan, runner, 1)
