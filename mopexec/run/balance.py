"""Whether experts starve, and what evens their loads."""

from collections.abc import Callable, Sequence
from math import inf, nextafter
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from mopexec.weights.export import check_exportable
from mopsim.common.errors import MopError
from mopsim.common.units import format_bytes
from mopsim.spec.plan import Plan
from mopsim.spec.routing import RoutingProfile, hot, in_words

LEAST = 16.0
"""Routes of an even load from which under 1/8 of it is no chance: of a Poisson count with this mean, 2 in a
million are below 2."""
MORE = 0.01
"""Part by which a peak must pass the predicted one to be told."""


def starving(run: Path, plan: Plan, loads: Sequence[int]) -> str:
    """A line on experts that had under 1/8 of an even load, with what evens loads in a run of this plan; ''
    where there are none, or too few tokens to tell. loads: `Measurement.expert_loads`.
    """
    model, training = plan.model, plan.training
    routes = training.global_batch * training.seq_len * model.num_experts_per_tok
    if not loads or not loads[0] or routes < LEAST * model.num_local_experts:
        return ""
    rate, weight = training.bias_update_rate, training.router_aux_loss_coef
    kept = "" if rate or not _lost(run, plan) else ", with which export refuses the run"
    ways = (("bias_update_rate", rate, kept), ("router_aux_loss_coef", weight, ""))
    more = [f"--set {field} above its {now:g}{note}" for field, now, note in ways if _rises(plan, field, now)]
    return (
        f"warning: {loads[0]} of {sum(loads)} experts had under 1/8 of an even load in the last step"
        f"{'; what evens loads: ' * bool(more)}{'; '.join(more)}"
    )


def fuller(plan: Plan, peak: int, routing: RoutingProfile) -> str:
    """A line on a peak that passes what was predicted with the plan's routing, where the run's own was more
    uneven; '' otherwise. peak: bytes; routing: as of the Measurement."""
    expected = plan.prediction.peak_memory if plan.prediction else 0
    planned, seen = plan.training.routing, hot(routing)
    if not expected or peak < (1 + MORE) * expected or seen is None or routing == planned:
        return ""
    percent, experts = seen
    even = 100 * experts / plan.model.num_local_experts
    if percent <= even:
        return ""
    return (
        f"peak memory is {peak / expected - 1:.1%} above the {format_bytes(expected)} predicted: that is of "
        f"the plan's routing, {in_words(planned)}, while this run's router sent {percent} % of the routes to "
        f"one rank's {experts} experts ({even:.0f} % would be even). "
        f"--routing {routing} of mopsim simulate or search predicts for that, search --any-routing for any"
    )


def _with(plan: Plan, **training: Any) -> Plan:
    return replace(plan, training=replace(plan.training, **training))


def _rises(plan: Plan, field: str, now: float) -> bool:
    """Whether `--set` takes more of a field than what it is now."""
    return _holds(lambda: _with(plan, **{field: nextafter(now, inf)}))


def _holds(check: Callable[[], object]) -> bool:
    try:
        check()
    except MopError:
        return False
    return True


def _lost(run: Path, plan: Plan) -> bool:
    """Whether a balance bias that moves is all for which export refuses the run."""
    return _holds(lambda: check_exportable(run, plan)) and not _holds(
        lambda: check_exportable(run, _with(plan, bias_update_rate=1.0))
    )
