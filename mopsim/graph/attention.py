"""The tape of an attention block: norm, projections, rotary embedding, exchange over the sequence, core,
output, residual."""

from functools import lru_cache

from msgspec.structs import replace

from mopsim.graph.region import begin, end
from mopsim.graph.shapes import Shapes, attended_span, attention_widths, causal_pairs, pairs_of_a_slice
from mopsim.graph.sparse_attention import latent_values, sparse_core
from mopsim.graph.tape import Kernel, Matmul, Tape, Value
from mopsim.graph.unfused import by_scores
from mopsim.spec.layout import ATTENTION_ROWS
from mopsim.spec.model import ModelSpec

_C = "attention"


@lru_cache(maxsize=1024)
def attention(model: ModelSpec, shapes: Shapes, layer: int) -> Tape:
    """x [N,H] -> y [N,H]. N = shapes.tokens; heads are split over `sequence` x `tensor` inside the core."""
    N, H, b = shapes.tokens, model.hidden_size, shapes.width
    x, y = Value("x", N * H * b), Value("y", N * H * b)
    kernels = [norm("attention_norm", "x", "h", N, H, b, _C)]
    rotates = model.rotates(layer)
    sparse = model.sparse_attention.index_topk > 0
    projected, values = _mla(model, shapes) if model.attention == "mla" else _gqa(model, shapes, rotates)
    kernels += projected
    if model.tempers(layer):
        q = Value("qt", values[0].bytes)
        kernels.append(
            Kernel("temperature", "memory_bound", _C, (values[0].name,), (q,), bytes=2 * q.bytes,
                   back_bytes=2 * q.bytes)
        )  # fmt: skip
        values = (q, *values[1:])
    kernels += (
        sparse_core(model, shapes, layer, *values[:2]) if sparse else _core(model, shapes, layer, values)
    )
    gated = model.attention_output_gate
    kernels += [_output_gate(kernels)] if gated else []
    _, v_width = attention_widths(model)
    k = model.num_attention_heads * v_width / shapes.tensor

    def product(out: Value) -> Kernel:
        return linear("o_proj", "og" if gated else "o", out, shapes.region_tokens, H, k, b, _C)

    kernels += end("scatter_a", product, Value("a", N * H * b), _C, shapes)
    kernels.append(residual("attention_residual", "a", "x", y, model, shapes, _C))
    return Tape((x,), tuple(kernels), ("y",))


def _output_gate(kernels: list[Kernel]) -> Kernel:
    """og = o * sigmoid(output gate)."""
    made = {one.name: one for kernel in kernels for one in kernel.writes}
    size = made["output_gate0"].bytes
    return Kernel(
        "output_gate", "memory_bound", _C, ("o", "output_gate0"), (Value("og", size),),
        saves=("o", "output_gate0"), bytes=3 * size, back_bytes=5 * size,
    )  # fmt: skip


def residual(
    name: str, branch: str, stream: str, out: Value, model: ModelSpec, shapes: Shapes, component: str
) -> Kernel:
    """out = stream + dropout(branch). A dropout keeps its mask, a byte an element (arXiv 2205.05198, 4.1)."""
    elements = shapes.tokens * model.hidden_size
    mask = Value(f"{branch}_mask", elements, grad=False)
    masks = (mask,) if model.dropout else ()
    return Kernel(
        name, "memory_bound", component, (branch, stream), (out, *masks),
        saves=tuple(one.name for one in masks), bytes=3 * out.bytes + elements * len(masks),
        back_bytes=(2 * out.bytes + elements) * len(masks), back_launches=len(masks),
    )  # fmt: skip


def norm(
    name: str, source: str, target: str, tokens: int, size: int, b: int, component: str, heads: float = 1
) -> Kernel:
    """RMSNorm (or LayerNorm) over `size`, or over each of `heads`: reads and writes tokens x size."""
    out = Value(target, tokens * size * b)
    return Kernel(
        name, "memory_bound", component, (source,), (out,), saves=(source,), bytes=2 * out.bytes,
        back_bytes=4 * out.bytes, back_launches=2, weight_grad=size * b,
        per_row=int(tokens * heads * b),
    )  # fmt: skip


def linear(
    name: str, source: str, out: Value, m: float, n: float, k: float, b: int, component: str, keeps: str = ""
) -> Kernel:
    """out[m,n] = source[m,k] W[n,k]^T. keeps: what the backward starts from instead of the source."""
    return Kernel(
        name, "matmul", component, (source,), (out,), saves=(keeps or source,), matmuls=(Matmul(m, n, k),),
        weight_grad=int(n * k * b),
    )  # fmt: skip


def _gqa(model: ModelSpec, shapes: Shapes, rotates: bool) -> tuple[list[Kernel], tuple[Value, Value, Value]]:
    """fused: one product for q, k and v, and one kernel that rotates q and k."""
    N, H, b, d = shapes.region_tokens, model.hidden_size, shapes.width, model.head_dim
    heads, kv = model.num_attention_heads / shapes.tensor, max(1, model.num_key_value_heads / shapes.tensor)
    sizes = {"q": heads * d, "k": kv * d, "v": kv * d}
    sizes |= {"output_gate": heads * d} if model.attention_output_gate else {}
    made = {name: Value(f"{name}0", int(N * size * b)) for name, size in sizes.items()}
    kernels = [linear(f"{name}_proj", "h", made[name], N, size, H, b, _C) for name, size in sizes.items()]
    if shapes.fused:
        first, source = begin("gather_h", "h", H, _C, shapes)
        width = sum(sizes.values())
        joint = Kernel(
            "qkv_proj", "matmul", _C, (source,), tuple(made.values()), saves=("h",),
            matmuls=(Matmul(N, width, H),), weight_grad=int(width * H * b),
        )  # fmt: skip
        kernels = [*first, joint]
    after = model.qk_norm == "unweighted" and rotates
    normed = after or model.qk_norm in ("head", "full")
    steps = ("rope", "norm") if after else ("norm",) * normed + ("rope",) * rotates
    names = ["q0", "k0"]
    for step in steps:
        sources, names = names, [f"{name}{'r' if step == 'rope' else '1'}" for name in "qk"]
        pairs = [(one, replace(made[one[0]], name=new)) for one, new in zip(sources, names, strict=True)]
        kernels += (
            _rotations(pairs, shapes)
            if step == "rope"
            else [_head_norm(one, new, model, N, int(sizes[one[0]]), b) for one, new in pairs]
        )
    q, k = (replace(made[name[0]], name=name) for name in names)
    return kernels, (q, k, made["v"])


def _rotations(pairs: list[tuple[str, Value]], shapes: Shapes) -> list[Kernel]:
    """Of queries and keys, (source, result) of each. fused: in one kernel, unless it turns them
    one after the other."""
    if shapes.fused and not shapes.rotates_apart:
        results = tuple(out for _, out in pairs)
        moved = 2 * sum(out.bytes for out in results)
        sources = tuple(source for source, _ in pairs)
        return [
            Kernel("rope", "memory_bound", _C, sources, results, bytes=moved, back_bytes=moved, launches=2)
        ]
    return [
        Kernel(
            f"rope_{source[0]}", "memory_bound", _C, (source,), (out,), bytes=4 * out.bytes, launches=5,
            back_launches=7,
        )
        for source, out in pairs
    ]  # fmt: skip


def _head_norm(source: str, out: Value, model: ModelSpec, tokens: int, size: int, b: int) -> Kernel:
    """That of q or k, head by head or over all of them."""
    heads = 1 if model.qk_norm == "full" else size / model.head_dim
    found = norm(f"{source[0]}_norm", source, out.name, tokens, size, b, _C, heads)
    return replace(found, weight_grad=0, weighted=False) if model.qk_norm == "unweighted" else found


def _mla(model: ModelSpec, shapes: Shapes) -> tuple[list[Kernel], tuple[Value, Value, Value]]:
    """Down-projections on the rank's own rows; a tensor-parallel region begins after (Megatron-Core)."""
    M, N, H, b = shapes.tokens, shapes.region_tokens, model.hidden_size, shapes.width
    heads = model.num_attention_heads / shapes.tensor
    rope, rank = model.qk_rope_head_dim, model.kv_lora_rank
    qk, v = attention_widths(model)
    q_value = Value("q0", int(N * heads * qk * b))

    def entering(gather: str, name: str, source: str, width: int, out: Value, columns: float) -> list[Kernel]:
        """A product that begins a region."""
        first, read = begin(gather, source, width, _C, shapes)
        return [*first, linear(name, read, out, N, columns, width, b, _C, source)]

    kernels: list[Kernel] = []
    if lora := model.q_lora_rank:
        kernels.append(linear("q_a_proj", "h", Value("qa", M * lora * b), M, lora, H, b, _C))
        kernels.append(norm("q_a_norm", "qa", "qn", M, lora, b, _C))
        kernels += entering("gather_q", "q_b_proj", "qn", lora, q_value, heads * qk)
    else:
        kernels += entering("gather_h", "q_proj", "h", H, q_value, heads * qk)
    kernels.append(linear("kv_a_proj", "h", Value("kva", M * (rank + rope) * b), M, rank + rope, H, b, _C))
    kernels.append(norm("kv_a_norm", "kva", "kvn", M, rank, b, _C))
    if model.sparse_attention.index_topk:
        absorbed, queries, keys = latent_values(model, shapes)
        return [*kernels, *absorbed], (queries, keys, keys)
    up = heads * (model.qk_nope_head_dim + v)
    kernels += entering("gather_kv", "kv_b_proj", "kvn", rank, Value("kvb", int(N * up * b)), up)
    size = int(N * heads * qk * b)
    q, k, value = Value("qr", size), Value("kr", size), Value("v0", int(N * heads * v * b))
    total = q.bytes + k.bytes + value.bytes
    kernels.append(
        Kernel(
            "rope", "memory_bound", _C, ("q0", "kvb", "kva"), (q, k, value), bytes=2 * total,
            launches=2 if shapes.fused else 10, back_launches=2 if shapes.fused else 14,
        )
    )  # fmt: skip
    return kernels, (q, k, value)


def _core(model: ModelSpec, shapes: Shapes, layer: int, values: tuple[Value, Value, Value]) -> list[Kernel]:
    """The exchange over the ranks of a sequence and the attention core. Writes `o`.

    Ulysses: exchange to head shards, attention over the whole sequence, exchange back. all_gather: keys and
    values of all ranks, own queries. Ring: key-value blocks go round beside the products with the block
    before. With the causal halves dealt out evenly (zig-zag), every rank computes 1/sequence of the pairs; in
    order, the last one the most.
    """
    d, b, band, seq = shapes.sequence, shapes.width, shapes.band(model, layer), shapes.seq_len
    by_heads, ring = shapes.exchange == "ulysses" or d == 1, shapes.exchange == "ring" and d > 1
    heads = model.num_attention_heads / (shapes.tensor * d if by_heads else shapes.tensor)
    rows = (shapes.attended if by_heads else shapes.region_tokens) * heads
    qk, v_width = attention_widths(model)
    before, inner = _traded(model, shapes, values)
    mine = inner if by_heads else values
    names = tuple(value.name for value in mine)
    if by_heads:
        pairs = causal_pairs(seq, *band) * (shapes.attended / seq)
    else:
        pairs = pairs_of_a_slice(seq, d, shapes.in_order, *band) * shapes.attended / seq
    out = Value("os" if by_heads and d > 1 else "o", int(rows * v_width * b))
    moved = sum(value.bytes for value in inner) if by_heads else _whole(values, d)
    core = Kernel(
        "attention_core", "attention", _C, tuple(value.name for value in inner), (out,),
        flops=2 * pairs * heads * (qk + v_width), seq=attended_span(seq // d if ring else seq, *band),
        bytes=moved + out.bytes, launches=d if ring else 1,
    )  # fmt: skip
    shared = model.attention == "gqa" and mine[1].bytes < mine[0].bytes
    shared = shared and (shapes.separate or not shapes.fused)
    if shapes.flash or not by_heads:
        working = rows * (qk + 1) * 4 + shared * rows * (qk + v_width) * b
        if not shapes.accumulates:
            core, working = _by_spans(core, mine, shapes, model, layer, shared)
        core = _flash(core, names, working, rows * (shapes.wide if shapes.by_rows else 4))
        core = by_scores(core, rows * seq) if shapes.unfused else core
    else:
        core = _kept(core, rows * seq, shapes.softmax, model.dropout > 0, b)
    home = [exchange("heads_to_sequence", ("os",), (Value("o", out.bytes),))] if out.name == "os" else []
    if by_heads:
        return [*before, core, *home]
    return [*before, *_of_blocks(core, values, before[0])]


def _by_spans(
    core: Kernel, values: tuple[Value, ...], shapes: Shapes, model: ModelSpec, layer: int, shared: bool
) -> tuple[Kernel, float]:
    """The core, and bytes of its backward, where one span after the other is attended to: documents of a
    sequence, of which one may be all of it, and chunks. Beside the whole results are those of a span
    (mopexec/operators/attention_core.py: _documents_backward)."""
    seq, window = shapes.seq_len, model.window(layer)
    span, chunked = seq, bool(model.attention_chunk_size)
    if chunked and window:
        span, window = min(window, seq), 0
    working, share = 0.0, 1.0
    apart = (shapes.packed or span < seq) and (shapes.exchange == "ulysses" or shapes.sequence == 1)
    if apart:
        share = span / shapes.attended
        values = tuple(replace(value, bytes=int(value.bytes * share)) for value in values)
        part = ("activations", int(core.writes[0].bytes * share))
        core = replace(core, share=share, scratch=(*core.scratch, part))
        working = float(sum(value.bytes for value in values))
    windowed = 0 < window < span
    if shapes.by_rows:
        return _of_rows(core, values, shapes, model, (span, window), working)
    if shared or windowed:  # a block's output and mask
        block = core.writes[0].bytes * values[1].bytes / values[0].bytes
        block *= window / shapes.attended if windowed else share
        block += _mask(span, window, shapes.width) if windowed else 0
        core = replace(core, scratch=(*core.scratch, ("activations", int(block))))
        working += _in_turn(values, span, window, shapes.width)
    return core, working


def _of_rows(
    core: Kernel, values: tuple[Value, ...], shapes: Shapes, model: ModelSpec, seen: tuple[int, int],
    working: float,
) -> tuple[Kernel, float]:  # fmt: skip
    """As `_by_spans` by blocks of query rows: a block's scores, in the backward with their gradients, and
    copies of its rows where heads share keys (mopexec/operators/attention_rows.py). seen: tokens of a span,
    and of a window."""
    whole, (q, k, _) = shapes.exchange == "ulysses" or shapes.sequence == 1, values
    span, window = seen if whole else (seen[0] // shapes.sequence, 0)
    rows, b = min(span, ATTENTION_ROWS), shapes.width
    keys = min(span, window + rows - 1) if window else span
    tokens = shapes.attended if whole else shapes.region_tokens
    part = rows * q.bytes / (core.share * tokens)
    heads = part / (rows * attention_widths(model)[0] * b)
    scores, copies = heads * rows * keys * b, part * (k.bytes < q.bytes)
    forward = scores + max(copies + rows * keys, part + 2 * heads * rows * b)
    blocks = int(core.launches * tokens / span * -(-span // rows))
    more = (*core.scratch, ("activations", int(forward)))
    core = replace(core, scratch=more, launches=12 * blocks, back_launches=17 * blocks)
    return core, working + 2 * scores + 2 * copies + heads * rows * b


def _mask(seq: int, window: int, b: int) -> int:
    """Bytes of what is added to the products of a window's queries and the keys that they see."""
    return min(window, seq) * min(2 * window - 1, seq) * b


def _in_turn(values: tuple[Value, ...], seq: int, window: int, b: int) -> float:
    """Bytes of the gradients of the query heads that share keys one to one, and of these keys and values: of
    a block of a window's queries alone, with its mask (mopexec/operators/attention_core.py: _cpu_backward).
    """
    (_, k, v), rows, keys = values, min(window or seq, seq), min(2 * window - 1 if window else seq, seq)
    each = 1 if rows == seq else keys / seq
    return k.bytes * (rows / seq + each) + v.bytes * each + (_mask(seq, window, b) if rows < seq else 0)


def _of_blocks(core: Kernel, values: tuple[Value, ...], exchange: Kernel) -> list[Kernel]:
    """Of others' keys and values a rank keeps none: they come again for the backward, which holds them beside
    their gradients, all of them where they are gathered, else the block that goes round, and beside both the
    gradients that the kernel makes of the queries and of one block (Transformer Engine, context_parallel.py:
    AttnFuncWithCPAndKVAllGather and AndKVP2P; mopexec/operators/context_parallel.py)."""
    own, gathered = sum(value.bytes for value in values[1:]), exchange.kind == "all_gather"
    size = (int(exchange.bytes) if gathered else own) + values[0].bytes + own
    core = replace(core, back_scratch=(*core.back_scratch, ("activations", size)))
    if not gathered:  # its backward sends them with their gradients
        return [core]
    again = Kernel(
        "gather_kv_again", "all_gather", _C, (), (), back_bytes=exchange.bytes, launches=0,
        back_launches=exchange.launches, group=exchange.group, back_kind="all_gather",
    )  # fmt: skip
    return [core, again]


def _whole(values: tuple[Value, ...], ranks: int) -> int:
    """Bytes of own queries, and of keys and values of all ranks."""
    return values[0].bytes + sum(value.bytes for value in values[1:]) * ranks


def _traded(
    model: ModelSpec, shapes: Shapes, values: tuple[Value, Value, Value]
) -> tuple[list[Kernel], tuple[Value, ...]]:
    """What ranks of a sequence send each other before the attention, and what it reads then. A ring has no
    gradients of its own: those of keys and values go round within the attention's backward (`_of_blocks`).
    """
    d, (q, k, v) = shapes.sequence, values
    if d == 1:
        return [], values
    if shapes.exchange == "ulysses":
        sizes = (_exchanged(value.bytes, d, model, shapes, i) for i, value in enumerate(values))
        inner = tuple(Value(f"{one.name}s", size) for one, size in zip(values, sizes, strict=True))
        return [exchange("sequence_to_heads", tuple(one.name for one in values), inner)], inner
    own = k.bytes + v.bytes
    if shapes.exchange == "ring":
        moving, sent = Value("moving", own, grad=False), float(own * (d - 1))
        ring = Kernel(
            "ring", "send_recv", _C, (), (moving,), bytes=sent, back_bytes=2 * sent,
            launches=d - 1, group="sequence",
        )  # fmt: skip
        return [ring], (*values, moving)
    whole = (Value("kg", k.bytes * d), Value("vg", v.bytes * d))
    gathered = Kernel(
        "gather_kv_blocks", "all_gather", _C, (k.name, v.name), whole, bytes=float(own * d), launches=2,
        group="sequence", back_kind="reduce_scatter",
    )  # fmt: skip
    return [gathered], (q, *whole)


def _flash(core: Kernel, inputs: tuple[str, ...], working: float, sums: float) -> Kernel:
    """Keeps its inputs, its output and `sums` bytes, an fp32 number for each row and head (arXiv 2205.14135).

    working: bytes of its backward, which adds up the queries' gradient in fp32 (arXiv 2307.08691, algorithm
    2); FlashAttention-2, torch's kernel, also makes those of keys and values for each query head where heads
    share them (flash_api.cpp: dq_accum, softmax_d, dk_expanded, dv_expanded).
    """
    out, lse = core.writes[0], Value("lse", int(sums), grad=False)
    return replace(
        core, writes=(out, lse), saves=(*inputs, out.name, lse.name),
        back_scratch=(("activations", int(working)),),
    )  # fmt: skip


def _kept(core: Kernel, scores: float, softmax: str, dropout: bool, b: int) -> Kernel:
    """Keeps the softmax of the whole square of scores; with dropout also its mask, a byte, and its result
    (5 a s^2 b in arXiv 2205.05198, 4.1). The scores themselves and their gradients come and go. A softmax in
    fp32 has its result and its gradient in fp32, and what dropout is given is not kept."""
    wide = 4 if softmax == "upcast" and b < 4 else 0
    size = (wide or b) + (b if dropout or wide else 0) + dropout
    kept = Value("attention_scores", int(scores * size), grad=False)
    more = {"fused": 0, "composed": 2, "upcast": 2 + wide // 2}[softmax]  # a scale, a mask; casts
    # two products, softmax, dropout, a copy; four products, the backward of the others, three copies
    return replace(
        core, launches=4 + dropout + more, back_launches=8 + dropout + more,
        writes=(*core.writes, kept), saves=(*core.reads, kept.name),
        scratch=(("activations", int(scores * (b + wide))),),
        back_scratch=(("activations", int(scores * 2 * (wide or b))),),
    )  # fmt: skip


def _exchanged(size: int, degree: int, model: ModelSpec, shapes: Shapes, index: int) -> int:
    """Bytes after the exchange: the same, but KV heads are replicated where `degree` exceeds them."""
    kv = max(1, model.num_key_value_heads // shapes.tensor)
    return size if index == 0 or model.attention == "mla" else size * max(degree, kv) // kv


def exchange(name: str, reads: tuple[str, ...], writes: tuple[Value, ...]) -> Kernel:
    """An all-to-all splits along the first dimension, so that each tensor is copied before and after it."""
    copies = 2 * max(value.bytes for value in writes)
    return Kernel(
        name, "all_to_all", _C, reads, writes, bytes=float(sum(value.bytes for value in writes)),
        launches=len(writes), group="sequence", scratch=(("activations", copies),),
        back_scratch=(("activations", copies),),
    )  # fmt: skip
