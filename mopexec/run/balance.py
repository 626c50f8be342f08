"""Whether experts starve, and what evens their loads."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from mopexec.run import kept
from mopexec.weights.begin import check_rules
from mopexec.weights.export import check_exportable
from mopsim.common.errors import MopError
from mopsim.common.units import format_bytes
from mopsim.spec.plan import Plan
from mopsim.spec.routing import RoutingProfile, hot, in_words

LEAST = 16.0
"""Routes of an even load from which under 1/8 of it is no chance: of a Poisson count with this mean, 2 in a
million are below 2."""
USUAL = {"bias_update_rate": 0.001, "router_aux_loss_coef": 0.01}
"""What is advised where a run has less, else twice what it has: DeepSeek-V3's rate (arXiv:2412.19437, 4.2),
the Switch Transformer's weight (arXiv:2101.03961, 2.2)."""
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
    ways = []
    for field, usual in USUAL.items():
        now = getattr(training, field)
        more = max(usual, 2 * now)
        if _trains(run, plan, field, more):
            lost = field == "bias_update_rate" and not now and _lost(run, plan)
            unless = ", with which export refuses the run" if lost else ""
            ways.append(f"--set {field}={more:g} (now {now:g}{unless})")
    return (
        f"warning: {loads[0]} of {sum(loads)} experts had under 1/8 of an even load in the last step"
        f"{'; to balance the loads: ' * bool(ways)}{' or '.join(ways)}"
    )


def fuller(plan: Plan, peak: int, routing: RoutingProfile) -> str:
    """A line on a peak that passes what was predicted with the plan's routing, where the run's own was more
    uneven; '' otherwise. peak: bytes; routing: as of the Measurement."""
    expected = plan.predicted.peak_memory if plan.predicted else 0
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


def _trains(run: Path, plan: Plan, field: str, value: float) -> bool:
    """Whether `train` takes this value for the run: the plan does, and the weights with which it began."""

    def check() -> None:
        changed = _with(plan, **{field: value})
        if kept.began_with_weights(run):
            check_rules(kept.folder_of(run), changed)

    return _holds(check)


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
