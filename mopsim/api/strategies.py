"""The families of mopsim.strategies with the world size left open: it is that of the nodes."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, ParamSpec

from mopsim import strategies
from mopsim.common.arguments import checked_arguments, named
from mopsim.spec.strategy import Strategy

P = ParamSpec("P")


@dataclass(frozen=True)
class StrategyTemplate:
    """A strategy for any number of ranks: `mopsim.mop(expert_parallel=8).on(16)` is that of 16 ranks."""

    family: str
    given: dict[str, Any]
    build: Callable[[int], Strategy] = field(repr=False, compare=False)

    def on(self, world_size: int) -> Strategy:
        """The Strategy of `world_size` ranks. Raises SpecError naming a degree that does not divide them."""
        return self.build(world_size)

    def __repr__(self) -> str:
        return f"{self.family}({', '.join(f'{name}={value!r}' for name, value in self.given.items())})"


def _template(make: Callable[Concatenate[int, P], Strategy]) -> Callable[P, StrategyTemplate]:
    """`make` without its first argument, world_size, which is given later."""
    signature = inspect.signature(make)
    keywords = {name: one for name, one in signature.parameters.items() if name != "world_size"}

    @wraps(make)
    def later(*args: P.args, **given: P.kwargs) -> StrategyTemplate:
        told = checked_arguments(make, 1, *args, **given).kwargs
        return StrategyTemplate(make.__name__, told, lambda ranks: named(make)(ranks, *args, **given))

    later.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=list(keywords.values()), return_annotation=StrategyTemplate
    )
    return later


mop = _template(strategies.mop)
fsdp2 = _template(strategies.fsdp2)
zero_offload = _template(strategies.zero_offload)
megatron = _template(strategies.megatron)
