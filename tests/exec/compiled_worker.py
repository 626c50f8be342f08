"""One rank of the tests of compiled blocks: by `aot_eager`, as a machine need not have a C++ compiler, or
`eager`, which makes no graphs of the backward."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from msgspec.structs import replace
from torch import Tensor
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks

from mopexec.distributed.tiers import Platform
from mopexec.measure.tracker import MemoryTracker
from mopexec.model import Routing, Transformer
from mopexec.modules.compiled import compile_blocks
from mopexec.operators import compiler, kernels
from mopexec.run import apply
from mopexec.weights.load import fill
from mopexec.weights.source import Seeded
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import Plan
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from tests.exec import network_parity
from tests.exec.flat_parity import differences, make_tokens, my_batches, reference, relative

STEPS = 2


def compare(
    platform: Platform, plan: Plan, routing: str, evaluates: bool, backend: str = "eager"
) -> dict[str, float]:
    """The largest relative differences from the single-device model over two clipped steps, with an
    evaluation after the first if asked for; graphs up to then, and after it; breaks of graphs.
    """
    _begin(backend)
    rank = int(os.environ["RANK"])
    runner = apply.build(plan, platform, routing=routing, seed=7)  # type: ignore[arg-type]
    expected = reference(plan, routing, platform.device, STEPS)
    worst: Counter[str] = Counter()
    for step, single in enumerate(expected):
        batches = my_batches(plan, make_tokens(plan, step), rank, platform.device)
        result = runner.step(batches)
        of_step = {
            "loss": abs(result.loss - single.loss) / abs(single.loss),
            "norm": abs(result.grad_norm - single.norm) / single.norm,
        } | differences(runner.full_gradients(), runner.full_parameters(), single)
        if step == 0:
            if evaluates:
                of_step["evaluation"] = abs(runner.evaluate(batches) - single.evaluation) / single.evaluation
            of_step["graphs"] = _graphs()
        worst |= Counter(of_step)
    found = {"later": _graphs() - worst["graphs"], "breaks": sum(counters["graph_break"].values())}
    return dict.fromkeys(("loss", "norm", "evaluation", "gradients", "weights"), 0.0) | dict(worst) | found


def verified(platform: Platform, plan: Plan) -> dict[str, float | str] | None:
    """What `mopexec verify` finds, the graphs that were made, and their breaks."""
    _begin("eager")
    found = network_parity.differences(platform, plan)
    made = {"graphs": _graphs(), "breaks": sum(counters["graph_break"].values())}
    return None if found is None else found | made


def watched(platform: Platform, plan: Plan) -> tuple[int, int]:
    """Graphs of a step whose memory is watched, and of one after it."""
    _begin("eager")
    rank, tracker = int(os.environ["RANK"]), MemoryTracker()
    batches = my_batches(plan, make_tokens(plan, 0), rank, platform.device)
    with tracker:
        runner = apply.build(plan, platform, seed=7)
        runner.step(batches)
    before = _graphs()
    runner.step(batches)
    return before, _graphs()


def resumed(platform: Platform, plan: Plan, folder: Path) -> dict[str, float]:
    """How far weights are off after a step that follows a checkpoint, where blocks are compiled after it and
    were not before it, and the other way round, from those of the run that went on as it was."""
    _begin("eager")
    batches = my_batches(plan, make_tokens(plan, 0), int(os.environ["RANK"]), platform.device)
    expected = {}
    for how in ("none", "block"):
        runner = apply.build(_as(plan, how), platform, seed=7)
        runner.step(batches)
        dcp.save(runner.state_dict(), checkpoint_id=str(folder / how))
        runner.step(batches)
        expected[how] = runner.full_parameters()
    graphs, found = _graphs(), {}
    for first, then in (("none", "block"), ("block", "none")):
        other = apply.build(_as(plan, then), platform, seed=8)
        state = other.state_dict()
        dcp.load(state, checkpoint_id=str(folder / first))
        other.load_state_dict(state)
        other.step(batches)
        weights = other.full_parameters()
        assert weights.keys() == expected[first].keys()
        found[first] = max(relative(weights[name], one, 0.0) for name, one in expected[first].items())
    return found | {"graphs": graphs, "later": _graphs() - graphs}


def kept(platform: Platform, model: ModelSpec) -> dict[str, tuple[int, int]]:
    """Bytes that a layer, the first and the last, keeps for its backward beside parameters: by the operators
    that a compiled stack names, and compiled. By kind of device and layer."""
    _begin()
    found = {}
    for kind in ("cuda", "cpu"):
        named = load_stack("mopexec-fsdp2").on_kind(kind).compiling("block").kernels
        here = replace(named, attention={"default": "cpu"}, expert_products="looped")
        for layer in (0, model.num_hidden_layers - 1):
            with kernels.using(here):
                found[f"{kind} {layer}"] = (_kept(model, layer, False), _kept(model, layer, True))
    return found


def _kept(model: ModelSpec, layer: int, compiled: bool) -> int:
    network = Transformer(model, torch.bfloat16, "cpu", Routing())
    fill(network, Seeded(3))
    if compiled:
        compile_blocks(network)
    block: Any = network.layers[layer]
    own = {one.untyped_storage()._cdata for one in block.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage.nbytes()
        return tensor

    x = torch.randn(1, 512, model.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    given = network.given(torch.zeros(1, 512, dtype=torch.int64), 0)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x, given).sum().backward()
    return sum(seen.values())


def _as(plan: Plan, how: str) -> Plan:
    strategy: Strategy = replace(plan.strategy, compile=how)
    return replace(plan, strategy=strategy)


def _begin(backend: str = "aot_eager") -> None:
    """As if nothing had been compiled in this process."""
    compiler.BACKEND = backend
    torch._inductor.config.cpp.vec_isa_ok = False  # vectors: three times as much to compile in each kernel
    torch._dynamo.guards.profile_guard_manager = lambda *given: 0.0  # for its log: 0.05 s a graph
    torch._dynamo.reset()
    counters.clear()


def _graphs() -> int:
    return int(counters["stats"]["unique_graphs"])
