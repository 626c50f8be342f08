"""A model's parameters counted from its fields, beside what its source states."""

from dataclasses import asdict, dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any

from mopsim.common.errors import require
from mopsim.spec.model import ModelSpec
from mopsim.spec.tensors import active_params, total_params

MOST_GAP, WIDEST_GAP = 0.02, 0.10
"""Relative gap between the count and the stated total: above the first, a field or the figure is wrong. A
figure of few digits ("13B" for 13.7 B) may be off by one unit of its last digit, but by no more than the
second."""


@dataclass(frozen=True)
class Counts:
    """Parameters: counted without MTP layers, as published totals are; stated: None where nothing is. active:
    of a token, with the whole input embedding, which some sources leave out of their figure."""

    total: int
    active: int
    embedding: int
    stated_total: float | None
    stated_active: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        """'30.53 B parameters (stated 30.5 B), 3.353 B active (stated 3.3 B)'."""
        total = f"{_billions(self.total)} parameters{_stated(self.stated_total)}"
        if self.active == self.total:
            return total
        return f"{total}, {_billions(self.active)} active{_stated(self.stated_active, self._rest())}"

    def _rest(self) -> str:
        """What the stated figure leaves out, where that makes it the counted one."""
        if self.stated_active is None:
            return ""
        most = tolerance(self.stated_active)
        whole, without = (
            abs(one / self.stated_active - 1) for one in (self.active, self.active - self.embedding)
        )
        return ", without the input embedding" if without <= most < whole else ""


@lru_cache(maxsize=256)
def counts(model: ModelSpec) -> Counts:
    """The counts of `model`. Raises SpecError where they contradict the stated total."""
    found = Counts(
        total_params(model), active_params(model), model.vocab_size * model.hidden_size, model.total_params,
        model.active_params,
    )  # fmt: skip
    stated = model.total_params
    if stated is not None:
        gap, most = abs(found.total / stated - 1), tolerance(stated)
        rule = (
            f"is not the {found.total:,} parameters of the model's fields: {gap:.1%} apart, more than "
            f"{most:.1%}; a field or the stated total is wrong (total_params may be left out)"
        )
        require(gap <= most, "model.total_params", round(stated), rule)
    return found


def tolerance(stated: float) -> float:
    """Relative gap that is allowed: MOST_GAP, or what one unit of the stated figure's last digit is."""
    digits = Decimal(f"{stated:.6g}").normalize()
    exponent = digits.as_tuple().exponent
    assert isinstance(exponent, int), f"{stated} is finite: ModelSpec holds it to 1e18"
    return min(max(MOST_GAP, 10.0**exponent / stated), WIDEST_GAP)


def _billions(number: float) -> str:
    return f"{number / 1e9:.4g} B" if number >= 1e7 else f"{number / 1e6:.4g} M"


def _stated(number: float | None, rest: str = "") -> str:
    return "" if number is None else f" (stated {_billions(number)}{rest})"
