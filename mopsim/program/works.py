"""Kernel -> work, with the matmul recipe of a strategy."""

from msgspec.structs import replace

from mopsim.common.units import DTYPE_BYTES
from mopsim.graph.host_costs import PERMUTED, UNFUSED
from mopsim.graph.rewrites.biases import bias_scaled, biased
from mopsim.graph.rewrites.chunks import in_chunks
from mopsim.graph.rewrites.eager import composed, gradients_stacked, gradients_stay, turned_back
from mopsim.graph.rewrites.gates import clamps_apart, gated_within
from mopsim.graph.rewrites.masked import by_masks
from mopsim.graph.rewrites.migration import rows_read
from mopsim.graph.rewrites.padded import padded_to_busiest, rows_aligned, weights_stacked
from mopsim.graph.rewrites.projections import (
    gathered_kept,
    gradients_added,
    heads_apart,
    inputs_copied,
    latents_split,
    lengths_read,
    norms_after,
    rows_apart,
    rows_exchanged,
    rows_fused,
    sliced,
    split,
    summed_apart,
    tables_gathered,
    values_padded,
)
from mopsim.graph.rewrites.quantized import cast_from_kept, cast_once, under_autocast, weights_cast
from mopsim.graph.rewrites.roomy import all_moved, with_room
from mopsim.graph.rewrites.router_losses import router_losses
from mopsim.graph.rewrites.sinks import sinks_apart
from mopsim.graph.shapes import attention_widths
from mopsim.graph.tape import Kernel
from mopsim.program.casts import Part, casts
from mopsim.program.context import Context
from mopsim.program.packed import ordered_pieces
from mopsim.program.scales import updated
from mopsim.program.workload import CommGroup, Work
from mopsim.spec.hardware import ATTENTION_BACKWARD, COLLECTIVES
from mopsim.spec.strategy import CAST

ROWS_OF_A_BLOCK = 4
"""Sorted rows that a block of torch's index_put_ begins at (rates.yaml, sorted_sums)."""


def implemented(kernels: tuple[Kernel, ...], context: Context) -> tuple[Kernel, ...]:
    """A layer's or the loss's kernels as the program runs them."""
    model, training, strategy = context.model, context.training, context.strategy
    losses = training.router_aux_loss_coef > 0, training.router_z_loss_coef > 0
    kernels = router_losses(kernels, *losses, strategy.micro_batch) if any(losses) else kernels
    wings, layernorm = model.ffn_matrices - 1, model.norm == "layernorm"
    run, sharding = context.stack.kernels, context.stack.sharding
    pieces = run.expert_outputs == "pieces" and context.own_experts > 1  # one alone is whole
    gone = {
        "expert_outputs": not pieces,
        "clamped_gate": not model.swiglu_limit, "head_norms": model.qk_norm != "head",
        "activation": run.activation.startswith("tanh") and model.ffn_activation.startswith("relu"),
    }  # fmt: skip
    ways = {name: getattr(run, name) for name in run.__struct_fields__ if not gone.get(name)}
    if run.norm == "upcast" and strategy.activations.recompute != "full":
        ways["norm"] = "upcast_again"  # a full one makes it again itself
    if run.residual == "routed":
        ways["residual"] = "composed" if "router" in {one.component for one in kernels} else "fused"
    if context.aligns_rows:
        kernels = rows_aligned(kernels)
    elif run.expert_padding in ("busiest", "fresh"):
        most = (run.expert_padding == "fresh") * context.tokens * strategy.experts.expert_parallel
        kernels = padded_to_busiest(kernels, context.own_experts, most)
    kernels = weights_stacked(kernels, context.b) if run.expert_weights == "stacked" else kernels
    turned, gates = run.rotary == "fused" and run.rotations == "apart", run.gate_up == "separate"
    fused = {"gated": gates and run.activation == "fused", "experts_gated": gates and model.swiglu_limit > 0}
    kernels = rows_fused(kernels, turned, [name for name, one in fused.items() if one])
    if context.rooms and run.expert_masks and not strategy.experts.sends_once:
        kernels = by_masks(kernels, context.rooms, context.b)
    if not model.sparse_attention.index_topk:  # else all heads share the keys, and so does their kernel
        kernels = heads_apart(kernels, run.grouped_heads == "repeated", _laid_out(context))
    kernels = attended(kernels, context)
    if run.expert_rows == "interleaved" and strategy.precision.matmul == "mxfp8":
        del ways["expert_rows"]
        kernels = gated_within(kernels)
    found = composed(kernels, ways, context.b, context.wide, wings, layernorm, strategy.experts.sends_once)
    if run.rotary == "wide" or turned:
        found = sliced(found, model.rotary_dim / model.head_dim, model.rope_interleave)
    found = clamps_apart(found) if ways.get("clamped_gate") == "apart" else found
    if run.sinks == "composed" and model.attention_sinks:
        found = sinks_apart(found, run.compiled)
    found = gathered_kept(found) if run.gathered_rows == "kept" else found
    found = _read_apart(found, context, wings, ways["residual"] == "composed")
    found = _exchanged(found, context) if run.exchanged_rows else found
    found = lengths_read(found) if _reads_lengths(context) else found
    if run.rotary == "gathered":
        found = tables_gathered(found, 4 * context.shapes.region_tokens * model.rotary_dim * context.b)
    how = run.qkv_split
    found = found if how == "fused" else split(found, how == "copied", how == "kept", not run.compiled)
    found = updated(_cast(found, context), context)
    found = _biased(found, context) if model.expert_bias else found
    found = chunked(found, context, "permute" if strategy.activations.recompute == "full" else "")
    found = under_autocast(found, context.param / context.b if context.stack.autocasts else 1)
    if sharding.copies or context.keeps_grads:
        apart = sharding.copies and sharding.groups == "modules"
        return gradients_stay(found, apart, apart and not context.stack.plain_experts(strategy))
    return gradients_stacked(found, model.ffn_matrices) if pieces else found


def projected(kernels: tuple[Kernel, ...], context: Context) -> tuple[Kernel, ...]:
    """The kernels with norms and rotations of the projections as the program composes them; the norm before
    them, of an explicit runtime, is made by slices (mopexec.operators.rows)."""
    run = context.stack.kernels
    ways = {"norm": run.norm, "rotary": run.rotary, "sequence_exchange": run.sequence_exchange}
    model, wider = context.model, context.wide / context.b
    share = model.rotary_dim / model.head_dim
    first, *rest = norms_after(
        latents_split(kernels, share, turned_back(wider) if run.rotary == "wide" else 0)
    )
    found = composed(tuple(rest), ways, context.b, context.wide, model.ffn_matrices - 1)
    return first, *sliced(found, share, model.rope_interleave)


def attended(kernels: tuple[Kernel, ...], context: Context) -> tuple[Kernel, ...]:
    """The kernels with the copies around an attention kernel that takes one width (Kernels.narrow_values)."""
    keys, values = attention_widths(context.model)
    if context.stack.kernels.narrow_values == "kept" or values >= keys:
        return kernels
    return values_padded(kernels, keys / values)


def _cast(kernels: tuple[Kernel, ...], context: Context) -> tuple[Kernel, ...]:
    """The kernels with what Kernels.casts and weight_casts say of torchao's."""
    run, recipe = context.stack.kernels, context.strategy.precision.matmul
    each = run.casts == "kept" or (run.casts, recipe) == ("composed", "fp8")
    kernels = kernels if each else cast_once(kernels)
    if recipe not in CAST:
        return kernels
    narrow = DTYPE_BYTES[recipe]
    kernels = cast_from_kept(kernels, narrow / context.b, run.exact) if run.casts == "made" else kernels
    return weights_cast(kernels, narrow_weight(context), run.exact) if run.weight_casts == "kept" else kernels


def narrow_weight(context: Context) -> float:
    """Bytes of a weight that is cast: Transformer Engine's are by rows and by columns."""
    run, recipe = context.stack.kernels, context.strategy.precision.matmul
    return DTYPE_BYTES[recipe] * (1 + (run.casts == "kept" and (run.weight_casts, recipe) != ("rows", "fp8")))


def _biased(kernels: tuple[Kernel, ...], context: Context) -> tuple[Kernel, ...]:
    """The kernels with what Kernels.expert_bias says."""
    run = context.stack.kernels
    if run.expert_bias == "scaled":
        once = context.strategy.experts.sends_once
        return bias_scaled(kernels, context.wide / context.b if once else 1.0)
    compiled = run.compiled and run.clamped_gate == "fused"
    return kernels if run.expert_bias == "fused" else biased(kernels, run.expert_bias, context.b, compiled)


def _exchanged(kernels: tuple[Kernel, ...], context: Context) -> tuple[Kernel, ...]:
    """The kernels with what Kernels.exchanged_rows says."""
    run, strategy = context.stack.kernels.exchanged_rows, context.strategy
    recipe = strategy.precision.matmul
    own = "quantized" in run and recipe in CAST
    narrow = own or ("cast" in run and recipe == "fp8")
    rows = DTYPE_BYTES[recipe] / context.b if narrow else 1.0
    ordered = "ordered" in run and strategy.micro_batch > 1 and not strategy.overlap.tensor
    grads = rows * (1 + (own and recipe != "fp8"))
    return rows_exchanged(kernels, ordered, rows, grads, context.stack.kernels.exact)


def _traced(context: Context, forward: bool) -> float:
    """What torch.vmap does around the operators of a mask that nothing compiles, in kernels' worth."""
    return UNFUSED[not forward] if context.shapes.unfused else 0.0


def _laid_out(context: Context) -> tuple[int, int]:
    """How often the attention's output, and its gradient, are laid out anew: see Kernels.attention_rows."""
    rows = context.stack.kernels.attention_rows
    if rows == "sequences":
        return (2, 2) if context.strategy.micro_batch > 1 else (0, 0)
    return int(rows == "heads"), 0


def _reads_lengths(context: Context) -> bool:
    """Whether the host reads from the device how long a microbatch's sequences are, in every layer."""
    when = context.stack.host.reads_lengths
    single = when == "single" and context.strategy.micro_batch == 1
    return when == "every" or single or ordered_pieces(context) > 0


def _read_apart(kernels: tuple[Kernel, ...], context: Context, wings: int, eager: bool) -> tuple[Kernel, ...]:
    """The kernels, and what is done because several products of their own read one value: see
    Kernels.gate_up, region_sums and region_rows. wings: products of a gated activation's first half."""
    run = context.stack.kernels
    counted: dict[str, int] = {}
    if run.gate_up in ("added", "ffn_added") and any(one.name == "qkv_proj" for one in kernels):
        counted = {"qkv_proj": 3 if run.gate_up == "added" else 1, "up_proj": wings}
    found = summed_apart(kernels, counted) if run.region_sums == "each" else kernels
    found = inputs_copied(found, counted) if run.region_inputs == "copied" else found
    found = rows_apart(found, counted, run.region_rows == "each") if run.region_rows != "once" else found
    return gradients_added(found, counted, eager)


def roomy(kernels: tuple[Kernel, ...], context: Context) -> tuple[Kernel, ...]:
    """The kernels, of which tensors of routed experts' rows have room for more than come."""
    run, strategy, room = context.stack.kernels, context.strategy, context.rows_room
    stash = room * run.expert_stash / run.expert_room if run.expert_stash else 0.0
    kernels = with_room(kernels, room, stash * context.casts_experts)
    return all_moved(kernels, room, not strategy.experts.sends_once) if context.moves_room else kernels


def chunked(kernels: tuple[Kernel, ...], context: Context, again: str) -> tuple[Kernel, ...]:
    """The kernels, of routed experts in the strategy's chunks (see in_chunks)."""
    moved = context.migration
    between = (rows_read(moved),) if moved and moved.reads else ()
    return in_chunks(kernels, context.shares, again, between)


def works(kernel: Kernel, part: Part, context: Context) -> tuple[Work, ...]:
    """The work of a kernel's forward, its backward, or one half of its backward."""
    found = _works(kernel, part, context)
    fills = context.stack.kernels.fills and found and kernel.kind not in COLLECTIVES
    return (*found, *_fills(kernel, part, context)) if fills else found


def _fills(kernel: Kernel, part: Part, context: Context) -> tuple[Work, ...]:
    """New tensors are written once before the kernel writes them: outputs, their gradients, and weight
    gradients that are not added where they belong at once."""
    values = kernel.writes if part == "forward" else tuple(v for v in kernel.writes if v.grad)
    sizes = [value.bytes for value in values if value.bytes] if part != "weight_grad" else []
    if part in ("backward", "weight_grad") and context.stack.kernels.weight_grads == "composed":
        sizes += [int(one.elements * context.b) for one in kernel.matmuls]
    return (Work("memory_bound", bytes=float(sum(sizes)), launches=len(sizes)),) if sizes else ()


def _works(kernel: Kernel, part: Part, context: Context) -> tuple[Work, ...]:
    if kernel.kind == "view":
        return ()
    if kernel.kind in ("matmul", "grouped_matmul"):
        return _products(kernel, part, context)
    if part == "weight_grad":
        return ()
    forward = part == "forward"
    launches = kernel.launches if forward else kernel.back_starts
    if kernel.kind == "attention":
        back = kernel.flops * ATTENTION_BACKWARD if kernel.back_flops is None else kernel.back_flops
        flops, moved = kernel.flops if forward else back, kernel.bytes * (2 - forward)
        if not flops:
            return ()
        precision = context.strategy.precision
        dtype = precision.products if precision.attention == "matmul" else precision.compute
        drops = context.model.dropout > 0 and context.stack.flash
        return (
            Work(
                "attention", flops=flops, seq=kernel.seq, bytes=moved, backward=not forward, dtype=dtype,
                drops=drops, indexer=kernel.indexer, launches=launches, host=_traced(context, forward),
            ),
        )  # fmt: skip
    size = kernel.bytes if forward else kernel.back_moved
    if kernel.kind in COLLECTIVES:
        kind = kernel.kind if forward or not kernel.back_kind else kernel.back_kind
        group = context.groups.get(kernel.group, CommGroup(1, 1))
        if not size or group.size == 1:
            return ()
        if group.choices:  # of the rows that the busiest rank gets: kernel.bytes holds each once a choice
            group = replace(group, choices=kernel.bytes / context.rows)
        spares = bool(context.strategy.overlap.tensor) and kernel.group == "tensor"
        work = Work(kind, bytes=size, launches=launches, group=group, spares=spares)
        hybrid = context.strategy.experts.token_dispatcher == "hybridep"
        mapped = hybrid and forward and kernel.name == "dispatch"
        return (*_map(context, group), work) if mapped else (work,)
    indexed = _by_index(kernel, context)
    atomic, ordered = _added(kernel, forward, context, size / 2 / context.b)
    sums = atomic if forward else atomic + kernel.back_sums
    if not size and not launches:
        return ()
    serial = 0.0 if forward else kernel.back_serial
    dots = 0.0 if forward else kernel.back_dots / context.b
    strided = kernel.strided if forward else kernel.back_strided
    ranked = kernel.ranked if forward and context.stack.kernels.top_k == "torch" else 0.0
    cut = _cut(kernel, forward, context)
    return (
        Work(
            "memory_bound", bytes=size, launches=launches, indexed=indexed, sums=sums, ordered=ordered,
            serial=serial, host=cut, strided=strided.size / context.b, strided_bytes=strided.bytes,
            ranked=ranked, dots=dots,
        ),
    )  # fmt: skip


def _cut(kernel: Kernel, forward: bool, context: Context) -> float:
    """Linears that a permutation which is not fused takes of the host (see host_costs.PERMUTED). Rows that a
    kernel has sent, or all ranks have gathered, are permuted by a mask, and not cut by expert; HybridEP's own
    kernels permute them."""
    stack, experts = context.stack, context.strategy.experts
    composed = stack.kernels.row_sums == "atomic" and stack.host.layers == "transformer_engine"
    if not composed or kernel.name != "sort" or experts.token_dispatcher == "hybridep":
        return 0.0
    cut = experts.token_dispatcher == "alltoall"
    parts = context.model.num_local_experts * experts.expert_tensor_parallel * cut
    return PERMUTED["layer"][not forward] + parts * PERMUTED["expert"][not forward]


def _permutations(context: Context) -> tuple[str, str]:
    """The permutation of rows by token, and the one that adds a token's rows: at home, or where rows that are
    sent once to a rank have arrived. None where HybridEP's kernels permute (Megatron-LM d98e8a64,
    megatron/core/transformer/moe/fused_a2a.py: dispatch_with_permute, combine_with_unpermute)."""
    experts = context.strategy.experts
    if experts.token_dispatcher == "hybridep" and experts.expert_parallel > 1:
        return ("", "")
    once = experts.gathers or (experts.sends_once and experts.expert_parallel > 1)
    return ("sort", "unsort") if once else ("permute", "accumulate")


def _by_index(kernel: Kernel, context: Context) -> bool:
    """Whether torch's own kernels copy rows by index."""
    run = context.stack.kernels
    if run.expert_rows == "added":
        return kernel.indexed and not run.compiled
    permuted = run.row_sums in ("atomic", "sorted") and kernel.name in _permutations(context)
    return kernel.indexed and (run.expert_rows in ("composed", "wide") or permuted)


def _added(kernel: Kernel, forward: bool, context: Context, elements: float) -> tuple[float, float]:
    """Elements of a pass of a permutation, where it adds rows of a token's routes, that atomic operations add
    up, and that are added once sorted, as if a token had ROWS_OF_A_BLOCK routes."""
    experts, how = context.strategy.experts, context.stack.kernels.row_sums
    routes = context.model.num_experts_per_tok
    if how == "gathered" or (how == "atomic_if_sparse" and routes >= experts.expert_parallel):
        return 0.0, 0.0
    rows = _permutations(context)
    if not kernel.indexed or kernel.name != rows[forward]:
        return 0.0, 0.0
    run = context.stack.kernels
    compiled = run.compiled and run.expert_rows == "added"
    if how == "sorted" and rows[0] == "permute" and (forward or not compiled):
        return 0.0, elements * min(1.0, routes / ROWS_OF_A_BLOCK)
    return elements, 0.0


def _map(context: Context, group: CommGroup) -> tuple[Work, ...]:
    """The choices of all rows of a group, gathered and read (HybridEP)."""
    size = float(group.size * context.tokens * context.model.num_local_experts)
    return (
        Work("all_gather", bytes=size, group=replace(group, choices=0.0)),
        Work("memory_bound", bytes=size),
    )


def _gradient(context: Context) -> float:
    """Bytes that a weight gradient's product moves for each element: of a fresh tensor, or of the sum in the
    buffer that gradients are added to."""
    fresh = context.stack.sharding.fsdp or context.stack.kernels.weight_grads == "composed"
    return float(context.b if fresh else 2 * context.grad)


def _products(kernel: Kernel, part: Part, context: Context) -> tuple[Work, ...]:
    precision = context.strategy.precision
    eight_bit = kernel.component == "vocabulary" and precision.vocabulary == "matmul"
    exact = kernel.component in context.stack.kernels.exact and not eight_bit
    dtype = precision.compute if exact else precision.products
    looped = kernel.kind == "grouped_matmul" and context.looped
    found = []
    for place, one in enumerate(kernel.matmuls):
        launches = int(place == 0 or kernel.kind != "grouped_matmul")
        shapes = {
            "forward": (one.m, one.n, one.k),
            "input_grad": (one.m, one.k, one.n),
            "weight_grad": (one.k, one.n, one.m),
        }
        if one.constant or one.frozen:
            del shapes["input_grad"]
        if one.frozen:
            del shapes["weight_grad"]
        for name, (m, n, k) in shapes.items():
            if part == name or (part == "backward" and name != "forward"):
                calls = int(one.count) if looped else 0
                gradient = _gradient(context) if name == "weight_grad" and one.weight else 0.0
                found.append(
                    Work(
                        kernel.kind, m=m, n=n, k=k, count=one.count, dtype=dtype, calls=calls,
                        launches=launches, gradient=gradient,
                    )
                )  # fmt: skip
    if DTYPE_BYTES[dtype] < DTYPE_BYTES[precision.compute]:
        found += casts(kernel, part, context, dtype, looped)
    added = context.stack.kernels.weight_grads == "composed" and not context.keeps_grads
    added = added and not context.makes_grads
    if part in ("backward", "weight_grad") and added:
        # each gradient is read, its buffer read and written
        size = sum(one.elements for one in kernel.matmuls) * (context.b + 2 * context.grad)
        found.append(Work("memory_bound", bytes=size, launches=len(kernel.matmuls)))
    return tuple(found)
