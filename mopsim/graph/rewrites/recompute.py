"""Recomputation of parts of a tape: what is dropped in the forward and made again in the backward."""

from collections.abc import Collection
from dataclasses import dataclass, replace

from mopsim.graph.tape import Kernel, Played, Step, Tape
from mopsim.spec.categories import COMPONENTS

MODULES: dict[str, tuple[str, ...]] = {
    "core_attn": ("ring", "gather_kv_blocks", "attention_core"),
    "layernorm": ("attention_norm", "ffn_norm"),
    "moe_act": ("experts_act",),
    "mla_up_proj": ("gather_q", "q_b_proj", "gather_kv", "kv_b_proj", "rope"),
}
"""Kernels of the modules that are smaller than a component (names of Megatron-Core's --recompute-modules)."""

WIDER: dict[str, tuple[str, ...]] = {"mlp": ("dense_ffn",), "moe": ("router", "experts", "shared_experts")}
"""Modules of several components."""

DISCARDED = ("layernorm", "moe_act", "mla_up_proj")
"""Modules whose output is dropped too, although what follows keeps it (output-discarding checkpoints)."""


@dataclass(frozen=True)
class Recomputation:
    """dropped: saved values that the forward frees all the same. kept: saved values that stay.

    again: regions of kernels to run again, each once, before the first kernel of the backward that wants one
    of its values.
    """

    dropped: frozenset[str]
    again: tuple[frozenset[int], ...]
    kept: frozenset[str]


def plan(
    tape: Tape, recompute: str, modules: tuple[str, ...], kept: tuple[str, ...] = (), early: bool = False
) -> Recomputation:
    """The plan of `Activations.recompute` for a tape. kept: kernels that a full one leaves out. early: it
    stops once the last value that the backward wants is there (torch.utils.checkpoint's early stop).
    """
    outside = {value.name for value in tape.inputs} | set(tape.outputs)
    saved = {name for kernel in tape.kernels for name in kernel.saves} - outside
    apart = _apart(tape, kept)
    own = frozenset(index for region in apart for index in region)
    if recompute == "full":
        after = _after(tape, own)
        count = len(tape.kernels)
        wanted = [i for i in range(count) if i not in own | after and _made(tape, {i}) & saved]
        end = max(wanted, default=-1) + 1 if early or own else count
        again = frozenset(i for i in range(end) if tape.kernels[i].name not in kept) - own - after
        made = _made(tape, [i for i in range(count) if tape.kernels[i].name in kept])
        made |= _made(tape, after) & saved
        regions = [region for region in (again, *apart) if _made(tape, region) & (saved - made)]
        return Recomputation(frozenset(saved - made), tuple(regions), frozenset(made - outside))
    regions = list(apart)
    dropped = _lost(tape, own, saved, discard=False)
    if recompute == "selective":
        found = {module: _region(tape, module) for module in modules}
        taken = own
        for module in sorted(found, key=lambda name: -len(found[name])):  # a wider one holds the narrower
            region = found[module] - taken
            taken |= region
            lost = _lost(tape, region, saved, module in DISCARDED)
            if lost:
                regions.append(region)
                dropped |= lost
    needed = {
        name
        for region in regions
        for index in region
        for name in tape.kernels[index].reads
        if not _written(tape, region, name)
    } - outside
    return Recomputation(frozenset(dropped), tuple(regions), frozenset((saved | needed) - dropped))


def _apart(tape: Tape, kept: tuple[str, ...]) -> tuple[frozenset[int], ...]:
    """Regions that run again in their own backward, without the kernels that are kept."""
    found: dict[str, set[int]] = {}
    for index, kernel in enumerate(tape.kernels):
        if kernel.region and kernel.name not in kept:
            found.setdefault(kernel.region, set()).add(index)
    return tuple(map(frozenset, found.values()))


def _after(tape: Tape, own: frozenset[int]) -> frozenset[int]:
    """Kernels outside of regions of their own that read what those make, at first hand or not."""
    names, found = _made(tape, own), set()
    for index, kernel in enumerate(tape.kernels):
        if index not in own and names & set(kernel.reads):
            found.add(index)
            names |= _made(tape, {index})
    return frozenset(found)


def _region(tape: Tape, module: str) -> frozenset[int]:
    names = MODULES.get(module)
    parts = WIDER.get(module, (module,) if module in COMPONENTS else ())
    return frozenset(
        i
        for i, kernel in enumerate(tape.kernels)
        if (kernel.name in names if names else kernel.component in parts)
    )


def _lost(tape: Tape, region: frozenset[int], saved: set[str], discard: bool) -> set[str]:
    """Saved values that the region writes; those that others keep only where the output is discarded."""
    written = {value.name for i in region for value in tape.kernels[i].writes} & saved
    if discard:
        return written
    others = {name for i, kernel in enumerate(tape.kernels) if i not in region for name in kernel.saves}
    return written - others


def _made(tape: Tape, region: Collection[int]) -> set[str]:
    return {value.name for i in region for value in tape.kernels[i].writes}


def _written(tape: Tape, region: frozenset[int], name: str) -> bool:
    return any(value.name == name for i in region for value in tape.kernels[i].writes)


def forward(tape: Tape, chosen: Recomputation) -> list[Played]:
    """A forward run that leaves `chosen.kept` alive, beside the tape's outputs."""
    inputs = {value.name for value in tape.inputs}
    keep = inputs | set(tape.outputs) | chosen.kept
    last: dict[str, int] = {}
    for index, kernel in enumerate(tape.kernels):
        for name in (*(value.name for value in kernel.writes), *kernel.reads):
            last[name] = index
    last |= dict.fromkeys(tape.held, len(tape.kernels) - 1)
    values = tape.values
    played = []
    for index, kernel in enumerate(tape.kernels):
        memory = [(value.category, value.bytes) for value in kernel.writes] + _spike(kernel.scratch)
        for name, when in last.items():
            if when == index and name not in keep:
                memory.append((values[name].category, -values[name].bytes))
        played.append(Played(kernel, False, tuple(memory)))
    return played


def held_for_weights(tape: Tape, chosen: Recomputation) -> frozenset[str]:
    """Values and (as `d/name`) gradients that weight gradients put off need."""
    products = [kernel for kernel in tape.kernels if kernel.matmuls]
    saved = {name for kernel in products for name in kernel.saves} & (chosen.kept | chosen.dropped)
    return frozenset(saved | {f"d/{value.name}" for kernel in products for value in kernel.writes})


def backward(tape: Tape, chosen: Recomputation, held: frozenset[str] = frozenset()) -> list[Played]:
    """The reverse of `forward`, regions run again where they are wanted. The inputs' gradients stay.

    held: what outlives this pass (see `held_for_weights`).
    """
    values, alive = tape.values, set(tape.outputs)
    freed = chosen.kept | chosen.dropped
    first_saver: dict[str, int] = {}
    last_saver: dict[str, int] = {}
    for index, kernel in enumerate(tape.kernels):
        for name in kernel.saves:
            first_saver.setdefault(name, index)
            last_saver[name] = index
    for region in chosen.again:  # what a region reads stays until its kernels' own backward
        for index in sorted(region):
            for name in tape.kernels[index].reads:
                if name in freed:
                    first_saver[name] = min(first_saver.get(name, index), index)
    for index, kernel in enumerate(tape.kernels):  # kept, although nothing reads it again
        for value in kernel.writes:
            if value.name in chosen.kept:
                first_saver.setdefault(value.name, index)
    due = _due(tape, chosen, last_saver)
    played: list[Played] = []
    for index in reversed(range(len(tape.kernels))):
        for when, region in due:
            if when == index:
                played += _again(tape, region, chosen.dropped)
        kernel = tape.kernels[index]
        memory: list[Step] = list(kernel.back_scratch)
        if kernel.weight_grad:
            memory += _spike((("activations", kernel.weight_grad),))
        for name in kernel.reads if kernel.writes else ():  # else the gradient is changed in place
            value = values[name]
            if value.grad and value.bytes:
                memory.append((value.category, value.bytes))
                if name in alive:
                    memory.append((value.category, -value.bytes))
                alive.add(name)
        memory += [(category, -size) for category, size in kernel.back_scratch]
        for value in kernel.writes:
            if value.grad and value.name in alive:
                if f"d/{value.name}" not in held:
                    memory.append((value.category, -value.bytes))
                alive.discard(value.name)
        for name in freed - held:
            if first_saver.get(name) == index:
                memory.append((values[name].category, -values[name].bytes))
        played.append(Played(kernel, True, tuple(memory)))
    return played


def _due(tape: Tape, chosen: Recomputation, last_saver: dict[str, int]) -> list[tuple[int, frozenset[int]]]:
    """Before the backward of which kernel each region runs again: before the first that wants one of
    its values, or before another region that reads one."""
    made = {
        region: {v.name for i in region for v in tape.kernels[i].writes} & chosen.dropped
        for region in chosen.again
    }
    reads = {region: {name for i in region for name in tape.kernels[i].reads} for region in chosen.again}
    due = {region: max(last_saver[name] for name in names) for region, names in made.items()}
    for region in sorted(due, key=min, reverse=True):
        for before, names in made.items():
            if before is not region and names & reads[region]:
                due[before] = max(due[before], due[region])
    return [(due[region], region) for region in sorted(due, key=min)]


def _again(tape: Tape, region: frozenset[int], dropped: frozenset[str]) -> list[Played]:
    """A region forward: its dropped values come back, what is only passed on inside dies."""
    order = sorted(region)
    last: dict[str, int] = {}
    for index in order:
        for name in (*(value.name for value in tape.kernels[index].writes), *tape.kernels[index].reads):
            last[name] = index
    last |= {name: order[-1] for name in tape.held if name in last}
    made: set[str] = set()
    values = tape.values
    played = []
    for index in order:
        kernel = tape.kernels[index]
        memory: list[Step] = []
        for value in kernel.writes:
            memory.append((value.category, value.bytes))
            made.add(value.name)
        memory += _spike(kernel.scratch)
        for name, when in last.items():
            if when == index and name in made and name not in dropped:
                memory.append((values[name].category, -values[name].bytes))
        played.append(Played(kernel, False, tuple(memory)))
    return played


def _spike(steps: tuple[Step, ...]) -> list[Step]:
    return [*steps, *((category, -size) for category, size in steps)]


def without_weight_grads(kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """Kernels whose weight gradients are added straight into resident buffers."""
    return tuple(replace(kernel, weight_grad=0) for kernel in kernels)
