"""What eager torch does where software with fused kernels runs one: each as a few kernels, some with numbers
in fp32 in between.

Traffic in passes over a tensor in the compute dtype (narrow) and over its fp32 copies (wide); that of a norm
is mopexec's.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from msgspec.structs import replace

from mopsim.graph.rewrites.norms import composed_norm
from mopsim.graph.rewrites.tensor_passes import COMPOSED, beside, charged, each, made, scratch, traffic
from mopsim.graph.rewrites.weighted_inputs import summed_at_home, weighed_apart, weighed_first
from mopsim.graph.tape import Kernel, Value

Change = Callable[[Kernel, float, int], Kernel]
HEAD_NORM_SUM = 70.0
"""One block of Transformer Engine's backward of a norm over a head adds up what some 2,000 blocks found
for its weight (rmsnorm_bwd_finalize_general_kernel): 61 and 80 us on H100, 74 and 75 on an earlier
machine, whatever the rows (BastiaanGroot/ML-Infrastructure-Engineer, training/profiles). In rows of
index_put_, of 1.04 us each (cost/ rates.yaml)."""


def composed(
    kernels: tuple[Kernel, ...], ways: Mapping[str, object], b: int, wide: int, wings: int,
    layernorm: bool = False, sent_once: bool = False,
) -> tuple[Kernel, ...]:  # fmt: skip
    """A tape's kernels as a program runs them. ways: how it runs each operation, by field of its stack's
    Kernels.

    b, wide: bytes of an element in the compute dtype and in fp32. wings: tensors that an activation reads.
    layernorm: norms are LayerNorms, for which torch has one kernel (torch.nn.functional.layer_norm).
    sent_once: rows come home summed (Experts.sends_once).
    """
    rows = ways.get("expert_rows")
    if rows in ("wide", "added"):  # of the weights alone
        gate = "composed" if ways.get("activation") in ("tanh", "tanh_wide") else ways.get("activation")
        ways = {**ways, "expert_rows": gate}

    def one(kernel: Kernel) -> Kernel:
        for operation, (belongs, changes) in _PARTS.items():
            way = str(ways.get(operation))
            native = layernorm and operation == "norm" and way in ("composed", "rounded")
            if way in changes and belongs(kernel) and not native:
                return changes[way](kernel, wide / b, wings)
        return kernel

    found = tuple(one(kernel) for kernel in kernels)
    if ways.get("expert_outputs") == "pieces":
        found = _one_by_one(found, wings)
    if ways.get("sequence_exchange") == "composed":
        found = each(found, _traded, "sequence_to_heads", "heads_to_sequence")
    inputs = str(ways.get("weighted_inputs", "tokens"))
    if rows in ("composed", "wide", "added"):
        found = _weighted(
            found, wide / b if rows == "wide" else 1.0, rows == "added" and not sent_once, inputs == "tokens",
            rows == "wide" and ways.get("row_sums") == "sorted",
        )  # fmt: skip
    if inputs != "tokens":
        found = weighed_apart(found, inputs, wide / b)
    if rows == "added" and not sent_once:
        found = _added(found, wide / b, bool(ways.get("compiled")))
    return _shared_gradients(found) if ways.get("residual") == "composed" else found


def _shared_gradients(kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """The gradient of a sum is that of what was added, no tensor of its own."""
    names = {kernel.reads[0] for kernel in kernels if kernel.name.endswith("residual")}
    names |= {name for kernel in kernels if kernel.name == "shared_sum" for name in kernel.reads}
    names |= {name for kernel in kernels if kernel.name == "accumulate" for name in kernel.reads[1:]}

    def shared(value: Value) -> Value:
        return replace(value, grad=False) if value.name in names else value

    return tuple(replace(one, writes=tuple(map(shared, one.writes))) for one in kernels)


def _weighted(
    kernels: tuple[Kernel, ...], wider: float, added: bool = False, anew: bool = True, batched: bool = False
) -> tuple[Kernel, ...]:
    """Route weights outside of the products: before an exchange that sums what it returns; else at home,
    where rows are put in the order of their tokens and summed by one product with the weights, for whose
    gradient autograd keeps them, in numbers `wider` than they came. Before such an exchange ranks tell each
    other how many rows go where; rows that do not travel lie in the order of experts already. added: no such
    product (see _added). Weights that rows read before they leave multiply them there, for whose gradient
    their tokens are kept where their rows are made anew, and nothing at home. batched: the product with the
    weights is torch.bmm, one token's rows at a time."""
    last = next((kernel for kernel in kernels if kernel.name == "accumulate"), None)
    if last is None:
        return kernels
    out = last.writes[0].bytes
    sent = int(last.bytes - out) // 2
    first = any(kernel.name == "permute" and "weight" in kernel.reads for kernel in kernels)
    travels = any(kernel.name == "combine" and kernel.kind == "all_to_all" for kernel in kernels)
    found: list[Kernel] = []
    for kernel in kernels:
        if kernel.name in ("sort", "unsort") and kernel.indexed and not travels:
            kernel = replace(kernel, bytes=0.0, launches=0, back_bytes=0.0, back_launches=0)
        if kernel.name == "permute" and kernel.writes[0].bytes:
            routes = next(one for one in kernels if one.name == "top_k").writes[0].bytes // 8
            index = Value("route_order", 16 * routes, "dispatch", grad=False)
            kernel = replace(kernel.keeping(index), scratch=(("dispatch", 8 * routes),))
            kernel = weighed_first(kernel) if first and anew else kernel
        if kernel.name == "permute" and travels and last.bytes != 2.0 * out:
            router = next(one for one in kernels if one.name == "router")
            found.append(
                Kernel(
                    "counts", "all_to_all", router.component, (), (), bytes=8.0 * router.matmuls[0].n,
                    back_bytes=0.0, group=next(one.group for one in kernels if one.name == "combine"),
                )
            )  # fmt: skip
        elif kernel.name == "unsort" and last.bytes == 2.0 * out and not first:
            kernel = beside(kernel, kernel.writes[0].bytes, COMPOSED["weighted"])
        elif kernel is last and last.bytes != 2.0 * out and first:
            found += summed_at_home(kernel, sent)
            continue
        elif kernel is last and last.bytes != 2.0 * out and not added:
            home = Value("home", int(sent * wider), "dispatch")
            moved = 2.0 * sent + ((1.0 + wider) * sent if wider > 1.0 else 0.0)
            found.append(
                replace(kernel, name="permute_back", reads=kernel.reads[:1], writes=(home,), bytes=moved,
                        back_bytes=moved)
            )  # fmt: skip
            kernel = replace(
                kernel, reads=("home", *kernel.reads[1:]), saves=("home",), indexed=False,
                bytes=float(home.bytes + out), back_bytes=3.0 * home.bytes, back_dots=float(out) * batched,
            )  # fmt: skip
        found.append(kernel)
    return tuple(found)


def _added(kernels: tuple[Kernel, ...], wider: float, compiled: bool) -> tuple[Kernel, ...]:
    """Rows that are back at home times their route weights, then added to their tokens. For the weights'
    gradient autograd keeps the rows in fp32, a compiler what they are cast from. compiled: with what casts
    and, in the backward, indexes, in one kernel; what adds is torch's own."""
    values = made(kernels)
    views = {one.writes[0].name: one.reads[0] for one in kernels if one.kind == "view" and one.reads}

    def change(kernel: Kernel) -> tuple[Kernel, ...]:
        rows = values[views.get(kernel.reads[0], kernel.reads[0])]
        size, wide = rows.bytes, int(rows.bytes * wider)
        how = COMPOSED["weighted_home_once" if compiled else "weighted_home"]
        weighed = replace(rows, name="weighed", grad=not compiled)
        spike = (("dispatch", 0 if compiled else wide),)
        first = Kernel(
            "weigh", "memory_bound", kernel.component, kernel.reads[:1], (weighed,),
            saves=(rows.name,) if compiled else (), scratch=spike, back_scratch=2 * spike,
        )  # fmt: skip
        copy = () if compiled else (replace(rows, name="rows_wide", bytes=wide, grad=False),)
        added = replace(
            kernel, reads=("weighed", *kernel.reads[1:]), back_bytes=0.0 if compiled else 2.0 * size,
            back_launches=int(not compiled),
        )  # fmt: skip
        return charged(first.keeping(*copy), how, size, wide), added

    return each(kernels, change, "accumulate")


def in_blocks(
    kernels: tuple[Kernel, ...], ranks: int, b: int, wide: int, way: str = "composed"
) -> tuple[Kernel, ...]:
    """A tape's kernels with what torch's context parallelism does around the attention of every block of keys
    and values (torch.distributed.tensor.experimental._attention), gathered at once or going round: in fp32
    and eagerly, it merges a block's output into those before, and in the backward adds the gradients of
    queries, keys and values.

    ranks: that share a sequence, one block each. b, wide: bytes of an element in the compute dtype and in
    fp32. way: Kernels.ring_blocks; scripted, as ring-flash-attn, it packs nothing.
    """
    if way == "joined":
        return _blocks_joined(kernels, ranks, wide / b)
    scripted = way == "scripted"
    came = next((kernel for kernel in kernels if kernel.name in ("gather_kv_blocks", "ring")), None)
    if came is None:
        return kernels
    place, later = next(i for i, kernel in enumerate(kernels) if kernel.name == "attention_core"), ranks - 1
    rings = came.name == "ring"
    out, own, wider = kernels[place].writes[0].bytes, came.bytes / (later if rings else ranks), wide / b
    how, added = COMPOSED[f"blocks_merged{'_scripted' * scripted}"], COMPOSED["block_added"].backward
    merged, sent = how.forward, how.backward
    packed = 0 if scripted else 2 * own * later
    ends = 1.0 if scripted else 1 + 2 * wider  # the sums cast back, and, where no block begins them, zeroed
    merge = Kernel(
        "merge_blocks", "memory_bound", came.component, ("o",), (),
        bytes=out * (merged.narrow * ranks + 1 + (merged.wide * later + 2) * wider) + packed,
        launches=merged.launches * later + 5,
        back_bytes=ranks * (traffic(added, out, out * wider) + traffic(sent, own, own * wider))
        + packed + (out + own) * ends,
        back_launches=(added.launches + sent.launches) * ranks + 6,
    )  # fmt: skip
    # Beside what came (back, where gradients go round by blocks, in the place of those of all keys and
    # values), and what a block's kernel needs: forward, the sum, the one before, and two of
    # what lies between, in fp32; back, keys and values packed to be sent, and in fp32 the queries' gradient
    # and theirs, as summed, packed and received (_templated_ring_attention of torch 2.13 on four CPU ranks).
    core = kernels[place]
    queries = next(value.bytes for one in kernels for value in one.writes if value.name == core.reads[0])
    whole = ("activations", int((own if rings else came.bytes) + own) + queries)
    back = [one for one in core.back_scratch if one != whole]
    back += scratch(int(out * wider + own * (2 + 3 * wider)))
    sums = scratch(int((3 if scripted else 4) * out * wider))
    core = replace(core, scratch=(*core.scratch, *sums), back_scratch=tuple(back))
    return (*kernels[:place], core, merge, *kernels[place + 1 :])


def _blocks_joined(kernels: tuple[Kernel, ...], blocks: int, wider: float) -> tuple[Kernel, ...]:
    """Blocks of keys and values stay, and what a rank has itself, until the last of so many has its output
    joined to those before, which lie beside it while it is made. wider: an element in fp32 over one in the
    compute dtype."""
    came = next((kernel for kernel in kernels if kernel.name in ("gather_kv_blocks", "ring")), None)
    if came is None:
        return kernels
    how = COMPOSED["blocks_joined"]

    def change(core: Kernel) -> tuple[Kernel, ...]:
        out, *sums = core.writes
        narrow, wide = how.working
        rows = sum(value.bytes for value in sums)
        reads = (out.name, *came.reads, *core.reads)
        beside = scratch(out.bytes * (narrow + wide * wider) + 4 * rows)
        join = Kernel("join_blocks", "memory_bound", core.component, reads, (), scratch=beside)
        core = replace(core, scratch=(*core.scratch, *scratch(out.bytes + rows)))
        join = charged(join, how, out.bytes * (blocks - 1.0), out.bytes * (blocks - 1.0) * wider)
        return core, replace(join, launches=join.launches * (blocks - 1))

    return each(kernels, change, "attention_core")


def _router(kernel: Kernel, wider: float, wings: int) -> Kernel:
    """Keeps the copy of its input in fp32 that its product reads."""
    if wider == 1:
        return kernel
    (_, size), *_ = kernel.scratch
    return replace(kernel, saves=(), scratch=()).keeping(Value("router_wide", size, grad=False))


def _one_by_one(kernels: tuple[Kernel, ...], wings: int) -> tuple[Kernel, ...]:
    """Products of one expert after another. Their outputs are put together, as are the gradients of their
    inputs; of what lies between only one expert has gradients at a time. Until the first expert's, which is
    the last, these inputs' gradients, an expert's two and their sum, are beside that of all outputs."""
    last = next((kernel for kernel in kernels if kernel.name == "experts_down"), None)
    total = sum(one.m * one.count for one in last.matmuls) if last else 0.0
    if last is None or not total:
        return kernels
    rows, most = last.writes[0].bytes, max(one.m for one in last.matmuls)
    wing = int(3 * most * rows / total * last.matmuls[0].k / last.matmuls[0].n)
    routed = [kernel for kernel in kernels if kernel.name.startswith("experts_")]
    wing = max(wing, int(_until_first(routed, 3 if wings > 1 else 1) * rows / total))

    def change(kernel: Kernel) -> tuple[Kernel, ...]:
        found = replace(kernel, loop=most / total)
        if kernel is last:
            return (replace(found, scratch=(("dispatch", rows),), back_scratch=(("activations", wing),)),)
        return (replace(found, writes=tuple(replace(value, grad=False) for value in kernel.writes)),)

    return each(kernels, change, *(kernel.name for kernel in routed))


def _until_first(routed: Sequence[Kernel], each: int) -> float:
    """Rows of gradients that experts one after another, the last one first, have made of their inputs beside
    that of all outputs, which stays until the first one's, less the rows that they kept. each: gradients of
    an expert's rows at a time."""
    values, out = made(routed), routed[-1].writes[0].bytes
    kept = sum(values[name].bytes for name in {name for one in routed for name in one.saves} & values.keys())
    *others, _ = (one.m for one in reversed(routed[-1].matmuls) for _ in range(int(one.count)))
    most = done = 0.0
    for rows in others:
        most = max(most, done + each * rows - kept / out * (done + rows))
        done += rows
    return most


def gradients_stay(kernels: tuple[Kernel, ...], apart: bool, opened: bool) -> tuple[Kernel, ...]:
    """Gradients of parameters appear kernel by kernel, last to first, and stay until their group's are all
    there. apart: the routed experts' are a group of their own. opened: beside which, once they are made, the
    shared experts' are somebody else's (Shards.beside)."""
    made, found, shared = {True: 0, False: 0}, [], 0
    routed = [apart and kernel.name.startswith("experts_") for kernel in kernels]
    for place in reversed(range(len(kernels))):
        kernel, inside = kernels[place], routed[place]
        if kernel.component == "shared_experts":
            shared += kernel.weight_grad
        elif opened and any(routed[: place + 1]):
            made[False], shared = made[False] - shared, 0
        if not inside and not any(routed[:place]) and made[True]:
            made[True] = 0  # summed into their shards
        made[inside] += kernel.weight_grad
        alive = (("gathered_grads", sum(made.values())),)
        found.append(replace(kernel, weight_grad=0, back_scratch=(*alive, *kernel.back_scratch)))
    return tuple(reversed(found))


def gradients_stacked(kernels: tuple[Kernel, ...], matrices: int) -> tuple[Kernel, ...]:
    """Gradients of routed experts' weights, made expert by expert, are all there before the inputs' gradients
    and then those of a matrix are put together. matrices: of an expert."""
    routed = [kernel for kernel in kernels if kernel.name.startswith("experts_") and kernel.weight_grad]
    if not routed:
        return kernels
    total = sum(kernel.weight_grad for kernel in routed)
    working = total + max(total // matrices, routed[-1].writes[0].bytes)
    first = replace(
        routed[0], weight_grad=0, back_scratch=(*routed[0].back_scratch, ("activations", working))
    )
    return tuple(first if kernel is routed[0] else kernel for kernel in kernels)


def _traded(kernel: Kernel) -> tuple[Kernel, ...]:
    """An exchange between slices of the sequence and of the heads, tensor by tensor: blocks for the ranks are
    stacked, sent, and what arrives is put together."""
    found: list[Kernel] = []
    for name, out in zip(kernel.reads, kernel.writes, strict=True):
        stacked, sent = (replace(out, name=f"{out.name}_{word}") for word in ("stacked", "sent"))
        copy = Kernel(
            "stack", "memory_bound", kernel.component, (name,), (stacked,), bytes=2.0 * out.bytes,
            back_bytes=2.0 * out.bytes,
        )  # fmt: skip
        found += [
            copy,
            replace(
                kernel, reads=(stacked.name,), writes=(sent,), bytes=float(out.bytes), launches=1, scratch=(),
                back_scratch=(),
            ),
            replace(copy, name="put_together", reads=(sent.name,), writes=(out,)),
        ]  # fmt: skip
    return tuple(found)


def _head_norm(kernel: Kernel, wider: float, wings: int) -> Kernel:
    return replace(kernel, back_serial=HEAD_NORM_SUM)


def _rotated(name: str) -> Change:
    """Queries and keys in one kernel, else as they were."""
    return lambda one, *rest: COMPOSED[name].of(one, *rest) if one.name == "rope" else one


def _complex(kernel: Kernel, wider: float, wings: int) -> Kernel:
    """Complex rotation; of latent attention the kernel writes values too, and rotates a part of a head."""
    name = "rotary_latent" if len(kernel.writes) == 3 else "rotary"
    return _rotated(name)(kernel, wider, wings)


def _by_token(kernel: Kernel, wider: float, wings: int) -> Kernel:
    return _rotated("rotary_by_token")(kernel, wider, wings) if len(kernel.reads) == 2 else kernel


def _halves(kernel: Kernel, wider: float, wings: int) -> Kernel:
    """Of latents, all three are written."""
    name = "rotary_latent_halves" if len(kernel.writes) == 3 else "rotary_halves"
    return COMPOSED[name].of(kernel, wider, wings)


def _chunks(kernel: Kernel, wider: float, wings: int) -> Kernel:
    """Of latents only a part is rotated, before keys and values are made: in less than these take. For their
    backward see `turned_back`."""
    found = COMPOSED[_of_chunks(wider)].of(kernel, wider, wings)
    return replace(found, scratch=(), back_scratch=()) if len(kernel.writes) == 3 else found


def _of_chunks(wider: float) -> str:
    return "rotary_wide_chunks" if wider > 1 else "rotary_chunks"


def turned_back(wider: float) -> float:
    """Bytes in the backward of a rotation of chunks, the gradient that it makes among them, over those of
    what it turns. The gradient that comes stays: a cast of it is beside it."""
    narrow, wide = COMPOSED[_of_chunks(wider)].back_working
    return narrow + wide * wider + 1 + (wider > 1)


def _summed(kernel: Kernel, wider: float, wings: int) -> Kernel:
    return beside(kernel, kernel.writes[0].bytes, COMPOSED["residual"])


_PARTS: dict[str, tuple[Callable[[Kernel], bool], dict[str, Change]]] = {
    "norm": (lambda one: one.name.endswith("norm"), {
        "composed": composed_norm, "rounded": partial(composed_norm, rounded=True),
        "upcast": COMPOSED["norm_upcast"].of, "upcast_again": COMPOSED["norm_upcast_again"].of,
    }),
    "rotary": (lambda one: one.name.startswith("rope"), {
        "by_token": _by_token, "halves": _halves, "gathered": _halves, "wide": _chunks,
        "composed": _complex, "upcast": COMPOSED["rotary_upcast"].of,
    }),
    "activation": (lambda one: one.name in ("act", "gelu"), {
        "composed": COMPOSED["gated"].of, "strided": COMPOSED["gated_strided"].of,
        "tanh": COMPOSED["gated_tanh"].of, "tanh_wide": COMPOSED["gated_tanh_wide"].of,
    }),
    "head_norms": (lambda one: one.name in ("q_norm", "k_norm"), {"summed": _head_norm}),
    "residual": (lambda one: one.name.endswith("residual"), {"composed": _summed}),
    "clamped_gate": (lambda one: one.name == "experts_act", {
        "composed": COMPOSED["clamped"].of, "again": COMPOSED["clamped_again"].of,
    }),
    "expert_rows": (lambda one: one.name == "experts_act", {
        "composed": COMPOSED["gated"].of, "shifted": COMPOSED["shifted"].of,
        "interleaved": COMPOSED["interleaved"].of,
    }),
    "router": (lambda one: one.name == "router", {"composed": _router}),
}  # fmt: skip
"""By operation, a field of Kernels: its kernels, and what each way makes of one."""
