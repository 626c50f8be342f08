"""Simulate, choose and size parallelism strategies for Mixture-of-Experts training. Never imports torch.

    import mopsim

    step = mopsim.simulate(
        "qwen3_30b_a3b", "h200-sxm-141g", nodes=2, strategy=mopsim.mop(expert_parallel=8),
        seq_len="32K", global_batch=64,
    )
    step.step_time_s, step.peak_memory_bytes, step.fits
    step.frame()                                  # pandas; a notebook shows `step` as a table

| function | answers |
|---|---|
| simulate | how long a step of one strategy takes and what memory it needs |
| search | which strategy is fastest on given nodes; `.best.save_plan(path)` for `mopexec train` |
| compare | several strategies side by side, over a sweep of lengths or nodes; `.write(folder)` for a report |
| size | which machine type, and how many nodes, to train in time: days, cost, energy |
| explore | a result of these as one offline page: tables that filter, Pareto scatter, timelines that zoom |
| interval | between which values the measured step time, throughput and memory will lie |
| mop, fsdp2, zero_offload, megatron | a strategy of each family, by the usual names of its degrees |
| load_model, load_hardware, load_stack | a network, a machine type or a program's habits, by name or file |
| list_models, list_hardware, list_stacks | the names that these know |

Units are SI: seconds, bytes, FLOP/s, tokens/s. A mistake raises MopError: one line with field, value, rule.
The commands of `mopsim` call these functions. Nothing is imported before it is used.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mopsim.api.compare import Comparison, compare
    from mopsim.api.explore import explore
    from mopsim.api.interval import Interval, interval
    from mopsim.api.results import Ranking, Result, Simulation
    from mopsim.api.run import search, simulate
    from mopsim.api.size import Clusters, size
    from mopsim.api.strategies import StrategyTemplate, fsdp2, megatron, mop, zero_offload
    from mopsim.common.errors import MopError, SpecError
    from mopsim.spec.presets import list_models, load_model
    from mopsim.spec.profiles import list_profiles as list_hardware
    from mopsim.spec.profiles import load_profile as load_hardware
    from mopsim.spec.stacks import list_stacks, load_stack

__version__ = "0.1.0"

_FROM = {
    "api.run": ("simulate", "search"),
    "api.compare": ("compare", "Comparison"),
    "api.size": ("size", "Clusters"),
    "api.explore": ("explore",),
    "api.interval": ("interval", "Interval"),
    "api.strategies": ("mop", "fsdp2", "zero_offload", "megatron", "StrategyTemplate"),
    "api.results": ("Result", "Simulation", "Ranking"),
    "spec.presets": ("load_model", "list_models"),
    "spec.stacks": ("load_stack", "list_stacks"),
    "common.errors": ("MopError", "SpecError"),
}
_WHERE = {name: module for module, names in _FROM.items() for name in names} | {
    "load_hardware": "spec.profiles:load_profile",
    "list_hardware": "spec.profiles:list_profiles",
}
"""Where each name of the API is, below `mopsim`; under another name there after the colon."""

__all__ = [
    "Clusters",
    "Comparison",
    "Interval",
    "MopError",
    "Ranking",
    "Result",
    "Simulation",
    "SpecError",
    "StrategyTemplate",
    "__version__",
    "compare",
    "explore",
    "fsdp2",
    "interval",
    "list_hardware",
    "list_models",
    "list_stacks",
    "load_hardware",
    "load_model",
    "load_stack",
    "megatron",
    "mop",
    "search",
    "simulate",
    "size",
    "zero_offload",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'mopsim' has no attribute {name!r}")
    module, _, other = _WHERE[name].partition(":")
    found = getattr(importlib.import_module(f"mopsim.{module}"), other or name)
    package = sys.modules.get(f"mopsim.{name}")
    if package is not None:  # `import mopsim.size.points as points` looks for its names at the function
        inside = found.__wrapped__  # what the signature is of
        found.__dict__ = vars(package)
        found.__wrapped__ = inside
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})


class _Front(ModuleType):
    """Packages inside that have the name of a function of the API do not replace it when they are imported:
    `from mopsim.search import ...` reaches the package, `mopsim.search` is the function, with the package's
    attributes."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Front
