"""How much of what mixers of linear attention take of the host is Triton's launches.

    TRITON=FOLDER python -m reports.host.te_linear_launches --sources ... \\
        --json reports/host/te_linear_launches.json

As te_linear.py measures them, which tells how to install what it needs: layers of MambaMixer and
GatedDeltaNet as they are, and with a stand-in that answers at once in place of every launch, in turn in one
process. Launches are counted by pass, with those that Triton tunes and the arguments of their kernels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from reports.host import te_layers, te_linear
from reports.host.te_layers import LAYERS, PHASES

ROUNDS = 30
Seen = dict[str, list[tuple[bool, int]]]


def answered(*_: object, **__: object) -> None:
    """A launch that is none."""


@contextmanager
def launching(get: Any) -> Iterator[None]:
    """Kernels are launched by what `get(kernel, grid, usual)` answers."""
    from triton import KernelInterface

    usual = KernelInterface.__getitem__
    KernelInterface.__getitem__ = lambda kernel, grid: get(kernel, grid, usual)
    try:
        yield
    finally:
        KernelInterface.__getitem__ = usual


def silent(call: te_layers.Call) -> list[float]:
    with launching(lambda *_: answered):
        return call()


def counted(call: te_layers.Call) -> dict[str, dict[str, float]]:
    """Launches of a layer in each pass, tuned ones and arguments among them."""
    from triton.runtime import Autotuner, JITFunction

    seen: Seen = {phase: [] for phase in PHASES}

    def get(kernel: Any, grid: object, usual: Any) -> Any:
        inner, tuned = kernel, False
        while not isinstance(inner, JITFunction):
            inner, tuned = inner.fn, tuned or isinstance(inner, Autotuner)
        phase = PHASES[torch._C._current_graph_task_id() >= 0]
        seen[phase].append((tuned, len(inner.arg_names)))
        return usual(kernel, grid)

    with launching(get):
        call()
    return {
        phase: {
            "kernels": len(found) / LAYERS,
            "tuned": sum(tuned for tuned, _ in found) / LAYERS,
            "arguments": sum(arguments for _, arguments in found) / LAYERS,
        }
        for phase, found in seen.items()
    }


def main() -> None:
    target, core = te_layers.begun(__doc__)
    te_layers.spread_experts()
    te_linear.install()
    import triton

    calls: dict[str, te_layers.Call] = {}
    launches = {}
    for kind, model in (("mamba2", te_linear.hybrid("M")), ("gated_delta", te_linear.delta())):
        call = partial(te_layers.microbatch, te_layers.reduced(model), model, False)
        call()
        launches[kind] = counted(call)
        calls |= {kind: call, f"{kind}, launching nothing": partial(silent, call)}
    took = te_layers.timed(calls, ROUNDS)
    every = te_layers.by_phase(took, calls)
    for kind, by in launches.items():
        for phase, found in by.items():
            found["linears"] = every[kind][phase] - every[f"{kind}, launching nothing"][phase]
    found = {"triton": triton.__version__, "layers": every, "launches": launches}
    te_layers.written(target, core, took, found)


if __name__ == "__main__":
    main()
