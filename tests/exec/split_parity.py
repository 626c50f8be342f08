"""What one rank does in tests of split_modules: train each plan beside the single-device model."""

import os

from mopexec.distributed.tiers import Platform
from mopexec.run import apply
from mopsim.spec.plan import Plan
from tests.exec.flat_parity import Reference, differences, make_tokens, my_batches
from tests.exec.spawn import end_groups

STEPS = 3


def compare(platform: Platform, cases: dict[str, tuple[Plan, str]]) -> dict[str, dict[str, float]]:
    """By case, on the first rank, the largest relative differences: of loss and norm of three clipped
    steps, of the loss of an evaluation in between, of each gradient and each weight of the last.
    """
    found = {}
    for name, (plan, routing) in cases.items():
        found[name] = _compare(platform, plan, routing)
        end_groups()
    return found


def _compare(platform: Platform, plan: Plan, routing: str) -> dict[str, float]:
    rank = int(os.environ["RANK"])
    runner = apply.build(plan, platform, routing=routing, seed=7)  # type: ignore[arg-type]
    reference = Reference(plan, routing, platform.device) if rank == 0 else None
    worst = {"loss": 0.0, "norm": 0.0, "gradients": 0.0, "weights": 0.0, "evaluation": 0.0}
    for step in range(STEPS):
        tokens = make_tokens(plan, step)
        result = runner.step(my_batches(plan, tokens, rank, platform.device))
        last = step == STEPS - 1
        gradients, weights = (runner.full_gradients(), runner.full_parameters()) if last else ({}, {})
        evaluated = runner.evaluate(my_batches(plan, tokens, rank, platform.device)) if step == 0 else 0.0
        if reference is None:
            continue
        loss, norm = reference.step(tokens.to(platform.device))
        assert norm > 2 * plan.training.clip_norm, f"clipping is not active at norm {norm}"
        worst["loss"] = max(worst["loss"], abs(result.loss - loss) / abs(loss))
        worst["norm"] = max(worst["norm"], abs(result.grad_norm - norm) / norm)
        if step == 0:
            worst["evaluation"] = abs(evaluated - reference.evaluate(tokens.to(platform.device))) / evaluated
        if not last:
            continue
        for kind, found in differences(gradients, weights, reference, norm).items():
            worst[kind] = max(worst[kind], found)
    return worst
