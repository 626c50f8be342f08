"""What one rank does in the tests of weights: begins a run, checkpoints it, trains two steps, again."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mopexec.distributed.tiers import Platform
from mopexec.model import Transformer
from mopexec.run import checkpoint
from mopexec.run.apply import build
from mopexec.run.kept import keep_given
from mopexec.run.shards import whole
from mopexec.run.state import run_state
from mopexec.weights.begin import open_weights
from mopexec.weights.load import fill
from mopexec.weights.source import Seeded
from mopsim.common import io
from mopsim.spec.plan import Plan
from tests.exec.flat_parity import my_batches
from tests.exec.spawn import end_groups


def begin_and_save(
    platform: Platform, plan: Plan, folder: Path | None, out: Path, tokens: Tensor, trains: bool = True
) -> float:
    """Checkpoints `out`/begun and, if it trains, `out`/trained of a run with the weights in `folder` (None:
    at random); returns the loss of the last on tokens [B, S + 1].
    """
    weights = None if folder is None else open_weights(folder, plan)
    runner = build(plan, platform, weights=weights)
    batches = my_batches(plan, tokens, dist.get_rank(), platform.device)
    for name, steps in (("begun", 0), ("trained", 2))[: 1 + trains]:
        for _ in range(steps):
            runner.step(batches)
        if dist.get_rank() == 0:
            io.write_yaml(out / name / "plan.yaml", plan)
            if folder is not None:
                keep_given(out / name, folder, None)
        dist.barrier()
        state = run_state(plan, steps, 0, "")
        checkpoint.save(out / name / "checkpoints", runner, state, keep=1)
    return runner.step(batches).loss


def rounded(platform: Platform, plans: dict[str, Plan]) -> dict[str, dict[str, tuple[float, float]]]:
    """By plan and parameter of a run that begins from seed 3: the largest difference of its master from the
    value drawn, and of the parameter from that value in the parameter's dtype.
    """
    found = {}
    for name, plan in plans.items():
        runner = build(plan, platform, seed=3)
        drawn = Transformer(plan.model, torch.float32)
        fill(drawn, Seeded(3))
        state = runner.state_dict()
        values = whole({key: one for key, one in state.items() if key.endswith(".value")})
        parameters, found[name] = runner.full_parameters(), {}
        for key, value in drawn.named_parameters():
            used = parameters[key]
            pairs = ((values[f"{key}.value"], value), (used, value.to(used.dtype)))
            found[name][key] = tuple((one - other).abs().max().item() for one, other in pairs)
        end_groups()
    return found
