"""What one rank does in tests of split_modules: train each plan beside the single-device model."""

import os

from mopexec.distributed.tiers import Platform
from mopexec.run import apply
from mopsim.spec.plan import Plan
from tests.exec.flat_parity import differences, make_tokens, my_batches, reference
from tests.exec.spawn import end_groups

STEPS = 2


def compare(platform: Platform, cases: dict[str, tuple[Plan, str]]) -> dict[str, dict[str, float]]:
    """By case, on the first rank, the largest relative differences: of loss and norm of two clipped
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
    worst = {"loss": 0.0, "norm": 0.0, "gradients": 0.0, "weights": 0.0, "evaluation": 0.0}
    steps = reference(plan, routing, platform.device, STEPS) if rank == 0 else (None,) * STEPS
    for step, expected in enumerate(steps):
        batches = my_batches(plan, make_tokens(plan, step), rank, platform.device)
        result = runner.step(batches)
        last = step == STEPS - 1
        gradients, weights = (runner.full_gradients(), runner.full_parameters()) if last else ({}, {})
        evaluated = runner.evaluate(batches) if step == 0 else 0.0
        if expected is None:
            continue
        worst["loss"] = max(worst["loss"], abs(result.loss - expected.loss) / abs(expected.loss))
        worst["norm"] = max(worst["norm"], abs(result.grad_norm - expected.norm) / expected.norm)
        if step == 0:
            worst["evaluation"] = abs(evaluated - expected.evaluation) / evaluated
        if last:
            worst |= differences(gradients, weights, expected)
    return worst
