"""Recomputation of parts of a tape: what is dropped in the forward and made again in the backward."""

from collections import defaultdict
from collections.abc import Collection

from msgspec.structs import replace

from mopsim.graph.liveness import Recomputation
from mopsim.graph.sparse_attention import INDEXER
from mopsim.graph.tape import GATE_CLAMPS, Kernel, Tape
from mopsim.spec.categories import COMPONENTS, JOINED
from mopsim.spec.hardware import COLLECTIVES

MODULES: dict[str, tuple[str, ...]] = {
    "core_attn": (
        "sequence_to_heads",
        "ring",
        "gather_kv_blocks",
        "attention_core",
        "heads_to_sequence",
        "stack",
        "put_together",
        *INDEXER,
        "absorb_v",
    ),
    "layernorm": ("attention_norm", "ffn_norm"),
    "moe_act": (GATE_CLAMPS, "experts_act"),
    "mla_up_proj": ("gather_q", "q_b_proj", "gather_kv", "kv_b_proj", "absorb_k", "rope"),
}
"""Kernels of the modules that are smaller than a component (names of Megatron-Core's --recompute-modules).
The core of attention has its exchange of a sequence: Megatron-Core checkpoints core_attention, inside of
which Transformer Engine exchanges (AttnFuncWithCPAndKVP2P, AndKVAllGather, AndQKVOA2A), mopexec its own."""

WIDER: dict[str, tuple[str, ...]] = {"mlp": ("dense_ffn",), "moe": ("router", "experts", "shared_experts")}
"""Modules of several components."""

AROUND = ("ffn_norm", "ffn_residual")
"""Kernels before and after an FFN or experts, booked on them."""

DISCARDED = ("layernorm", "moe_act", "mla_up_proj")
"""Modules whose output is dropped too, although what follows keeps it (output-discarding checkpoints)."""


def plan(
    tape: Tape, recompute: str, modules: tuple[str, ...], kept: tuple[str, ...] = (), early: bool = False,
    apart: Collection[str] = (), within: Collection[str] = (), scattered: bool = False, whole: str = "",
) -> Recomputation:  # fmt: skip
    """The plan of `Activations.recompute` for a tape. kept: kernels that a full one leaves out. early: it
    stops once the last value that the backward wants is there (torch.utils.checkpoint's early stop). apart:
    kernels that belong to no module. within: products whose kernel has the norm before them too, whose output
    it then keeps. scattered: of a kept product of partial sums, what a reduce-scatter makes of them is kept.
    whole: the name of a kept kernel of which what its backward reads stays too, and is made again beside it.
    """
    outside, saved = tape.outside, tape.kept
    alone = _alone(tape, kept)
    own = frozenset(index for region in alone for index in region)
    if recompute == "full":
        kept += tuple(name for name, parts in JOINED.items() if {*parts} <= {*kept})
        after = _after(tape, own)
        count = len(tape.kernels)
        wanted = [i for i in range(count) if i not in own | after and _made(tape, {i}) & saved]
        end = max(wanted, default=-1) + 1 if early or own else count
        left, sums = _left_out(tape, kept, scattered)
        again = frozenset(range(end)) - left - own - after
        again -= _idle(tape, again, saved)
        made = _made(tape, left) - sums
        made |= _made(tape, after) & saved
        made |= {name for i in left if tape.kernels[i].name == whole for name in tape.kernels[i].saves}
        regions = [region for region in (again, *alone) if _made(tape, region) & (saved - made)]
        passed = (made - saved - outside) & (_read(tape, again) - _read(tape, own | after))
        return Recomputation(
            frozenset(saved - made), tuple(regions), frozenset(made - outside), frozenset(passed)
        )
    regions = list(alone)
    dropped = _lost(tape, own, saved, discard=False)
    if recompute == "selective":
        found = {module: members(tape, module, within) for module in modules}
        taken = own
        for module in sorted(found, key=lambda name: -len(found[name])):  # a wider one holds the narrower
            region = frozenset(i for i in found[module] - taken if tape.kernels[i].name not in apart)
            taken |= region
            lost = _lost(tape, region, saved, module in DISCARDED)
            if early:
                last = max((i for i in region if _made(tape, {i}) & lost), default=-1)
                region = frozenset(i for i in region if i <= last)
            if lost:
                regions.append(region)
                dropped |= lost
    needed = set().union(*(_read(tape, region) - _made(tape, region) for region in regions)) - outside
    return Recomputation(frozenset(dropped), tuple(regions), frozenset((saved | needed) - dropped))


def _left_out(tape: Tape, kept: tuple[str, ...], scattered: bool) -> tuple[frozenset[int], set[str]]:
    """Kernels that are kept; if `scattered`, with the reduce-scatter of what one makes, which stays in the
    place of the partial sums: these."""
    named = {i for i, kernel in enumerate(tape.kernels) if kernel.name in kept}
    partial = _made(tape, named)
    kernels = enumerate(tape.kernels)
    found = {i for i, kernel in kernels if kernel.kind == "reduce_scatter" and {*kernel.reads} <= partial}
    scatters = found if scattered else set[int]()
    return frozenset(named | scatters), _read(tape, scatters)


def _idle(tape: Tape, again: frozenset[int], saved: set[str]) -> frozenset[int]:
    """Gathers for what is not run again: each is in one operation with what reads it."""
    wanted = saved | _read(tape, again)
    gathers = {i for i in again if tape.kernels[i].kind in ("all_gather", "send_recv")}
    return frozenset(i for i in gathers if (made := _made(tape, {i})) and not made & wanted)


def _alone(tape: Tape, kept: tuple[str, ...]) -> tuple[frozenset[int], ...]:
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


def members(tape: Tape, module: str, within: Collection[str]) -> frozenset[int]:
    """Kernels of a module; `layernorm` has no norm that is in the kernel of a product (`within`)."""
    names = MODULES.get(module)
    parts = WIDER.get(module, (module,) if module in COMPONENTS else ())
    return frozenset(
        i
        for i, kernel in enumerate(tape.kernels)
        if (kernel.name in names if names else kernel.component in parts)
        and not (module == "layernorm" and _next_product(tape, i) in within)
    )


def shares(
    tape: Tape, chosen: Recomputation, modules: tuple[str, ...]
) -> dict[str, tuple[float, float, tuple[str, ...]]]:
    """Of each component that is not recomputed whole, the parts of its kernels that run again: all, and those
    of no smaller module; and these modules, each norm as one."""
    wide = {part for module in modules for part in WIDER.get(module, (module,))}
    small = {name: module for module in modules for name in MODULES.get(module, ())}
    again = {index for region in chosen.again for index in region}
    whole, names = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for index, kernel in enumerate(tape.kernels):
        if kernel.kind not in COLLECTIVES and kernel.writes and kernel.component not in wide:
            whole[kernel.component].append(kernel.name)
            names[kernel.component] += [kernel.name] if index in again else []
    found = {}
    for component, ran in names.items():
        alone = [small[name] for name in ran if name in small]
        norms = alone.count("layernorm") * ("layernorm",)
        parts = [len(ran), sum(name not in small for name in ran)]
        share, rest = (part / len(whole[component]) for part in parts)
        found[component] = share, rest, norms + tuple(sorted({*alone} - {"layernorm"}))
    return found


def _next_product(tape: Tape, place: int) -> str:
    """The first product after a kernel."""
    return next((kernel.name for kernel in tape.kernels[place + 1 :] if kernel.matmuls), "")


def _lost(tape: Tape, region: frozenset[int], saved: set[str], discard: bool) -> set[str]:
    """Saved values that the region writes; those that others keep only where the output is discarded."""
    written = _made(tape, region) & saved
    if discard:
        return written
    others = {name for i, kernel in enumerate(tape.kernels) if i not in region for name in kernel.saves}
    return written - others


def _made(tape: Tape, region: Collection[int]) -> set[str]:
    return {value.name for i in region for value in tape.kernels[i].writes}


def _read(tape: Tape, region: Collection[int]) -> set[str]:
    return {name for i in region for name in tape.kernels[i].reads}


def gathered_once(tape: Tape, recompute: str, modules: tuple[str, ...]) -> Tape:
    """The tape, in which a recomputation of routed experts keeps the rows that it gathers over expert-tensor
    ranks, from which a backward would otherwise gather them again."""
    if recompute != "full" and not (recompute == "selective" and "moe" in modules):
        return tape
    kernels = tuple(
        replace(kernel, saves=kernel.reads) if kernel.reads == ("rows_g",) else kernel
        for kernel in tape.kernels
    )
    return replace(tape, kernels=kernels)


def without_weight_grads(kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """Kernels whose weight gradients are added straight into resident buffers."""
    return tuple(replace(kernel, weight_grad=0) if kernel.weight_grad else kernel for kernel in kernels)


def saved_to_router(tape: Tape, chosen: Recomputation) -> frozenset[str]:
    """What a recomputation saves on the way to a router that it runs again."""
    found: set[str] = set()
    for region in chosen.again:
        routers = [index for index in region if tape.kernels[index].component == "router"]
        for index in region:
            if index <= max(routers, default=-1):
                found |= set(tape.kernels[index].saves)
    return frozenset(found & chosen.dropped)
