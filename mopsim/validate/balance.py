"""What a log prints of its load-balancing loss, as that of the mean MoE layer in one forward. Programs and
their releases differ in what they print: data/balance_losses.yaml."""

from typing import Literal

from mopsim.common.errors import require
from mopsim.common.rules import Condition
from mopsim.common.shipped import listed_in
from mopsim.spec.model import ModelSpec
from mopsim.validate.tables import UNKNOWN, Row, UnsupportedError, number

COLUMN = "load_balancing_loss"


class PrintedLoss(Condition, frozen=True, kw_only=True):
    """layers: of which the mean is printed; again: whether a layer that is recomputed whole counts twice."""

    layers: Literal["all", "moe"]
    again: bool
    source: str

    def times(self, row: Row, model: ModelSpec) -> float:
        """What is printed, over the loss of the mean MoE layer."""
        part = model.num_moe_layers / model.num_hidden_layers if self.layers == "all" else 1.0
        return part * (2.0 if self.again and row.get("recompute") == "full" else 1.0)


printed_losses = listed_in("mopsim.validate", PrintedLoss, "data/balance_losses.yaml")
"""The entries, of which at most one is of a program and a month."""


def balance_loss(row: Row, model: ModelSpec) -> float | None:
    """The loss, 1 where routes are even; None where the row has none. It is near 1 whatever the loads are
    where scores of a sigmoid are normalised to be its probabilities (Megatron-Core, moe_utils.py,
    compute_routing_scores_for_aux_loss).

    row: with its `stack`, `date` and whether it is `dated`, as of facts. Raises UnsupportedError.
    """
    printed, experts = number(row, COLUMN), model.num_local_experts
    if printed is None:
        return None
    if row.get("routing") != "natural":
        raise UnsupportedError(COLUMN, "is of a row whose routing is natural")
    if not model.num_moe_layers:
        raise UnsupportedError(COLUMN, "is of a network with experts")
    if model.scoring_func != "softmax":
        why = f"tells no loads of a router whose scoring_func is {model.scoring_func!r}, only of 'softmax'"
        raise UnsupportedError(COLUMN, why)
    for column in ("loads", "filler_tokens"):
        if row.get(column, "") not in UNKNOWN:
            raise UnsupportedError(COLUMN, f"is stated beside {column}: leave one out")
    times, chosen = _times(row, model), model.num_experts_per_tok
    rule = f"must be from 1 (even) to below {experts / chosen:g}, where all tokens take the same {chosen}"
    whole = "" if times == 1 else f"; its program's release prints {times:.3g} where routes are even"
    require(1 <= printed / times < experts / chosen, COLUMN, printed, f"{rule} of {experts} experts{whole}")
    return printed / times


def _times(row: Row, model: ModelSpec) -> float:
    """Of a row without a month in its words, the same in all months that it can be of."""
    date = row.get("date", "")
    later = () if row.get("dated") else (one.since for one in printed_losses() if one.since > date)
    found = {
        one.times(row, model)
        for month in (date, *later)
        for one in printed_losses()
        if one.fits({**row, "date": month})
    }
    if not found:
        month, stack = date or "no month", row.get("stack") or "no stack"
        why = f"is not known to be comparable in logs of {stack} of {month} (balance_losses.yaml)"
        raise UnsupportedError(COLUMN, why)
    if len(found) > 1:
        why = "means what its program's release prints, and no month of the run is in the row's words"
        raise UnsupportedError(COLUMN, why)
    return found.pop()
