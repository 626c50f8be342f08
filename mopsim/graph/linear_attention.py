"""The tape of a layer whose mixer is linear attention: norm, one projection, a causal convolution, the scan
in chunks, a gated norm, output, residual."""

from functools import lru_cache

from msgspec.structs import replace

from mopsim.graph.attention import exchange, linear, norm, residual
from mopsim.graph.region import begin, end
from mopsim.graph.shapes import Shapes
from mopsim.graph.tape import Kernel, Strided, Tape, Value
from mopsim.spec.linear_attention import LinearAttention
from mopsim.spec.model import ModelSpec

_C = "attention"
_PARTS = 5
"""Of what is projected: gate, values, keys, queries, and a number for each head."""
_WIDE = 4
"""Bytes of the numbers that a scan keeps its decays, its states and the products of its chunks in."""


@lru_cache(maxsize=1024)
def linear_attention(model: ModelSpec, shapes: Shapes) -> Tape:
    """x [N,H] -> y [N,H]. Heads are split over `tensor`, and inside the scan over `sequence` too, whose ranks
    exchange whole sequences of some heads (Megatron-Core, mamba_context_parallel.py)."""
    how, b = model.linear_attention, shapes.width
    N, H, rows = shapes.tokens, model.hidden_size, shapes.region_tokens
    x, y = Value("x", N * H * b), Value("y", N * H * b)
    width, values = how.projected / shapes.tensor, how.values / shapes.tensor
    how = _within(how, shapes)
    first, source = begin("gather_h", "h", H, _C, shapes)
    projected = Value("mixed", int(rows * width * b))
    scanned = Value("scanned", int(rows * values * b))
    kernels = [
        norm("attention_norm", "x", "h", N, H, b, _C),
        *first,
        linear("in_proj", source, projected, rows, width, H, b, _C, "h"),
    ]
    split = shapes.sequence > 1
    inner = Value("mixed_s", int(rows * how.projected / shapes.tensor * b)) if split else projected
    out = Value("scanned_s", scanned.bytes) if split else scanned
    if split:
        kernels += _to_heads(projected, inner)
    if shapes.by_token and shapes.attended > shapes.seq_len:
        rows_in, rows_out = Value("mixed_b", inner.bytes), Value("scanned_b", out.bytes)
        kernels += [
            _turned("to_sequences", inner.name, rows_in, back=True),
            _scan(how, shapes, rows_in, rows_out),
            _turned("to_tokens", rows_out.name, out, back=False),
        ]
    else:
        kernels.append(_scan(how, shapes, inner, out))
    if split:
        kernels += _to_sequence(out, scanned)
    kernels.append(_gated_norm(model.linear_attention, shapes, values))

    def product(out: Value) -> Kernel:
        return linear("o_proj", "o", out, rows, H, values, b, _C)

    kernels += end("scatter_a", product, Value("a", N * H * b), _C, shapes)
    kernels.append(residual("attention_residual", "a", "x", y, model, shapes, _C))
    return Tape((x,), tuple(kernels), ("y",))


def _to_heads(source: Value, out: Value) -> tuple[Kernel, Kernel]:
    """Rows of all tokens of some heads, from all heads of some tokens: gate, values, keys, queries and steps
    are cut by ranks and exchanged one by one, joined, and put in the order of the sequence, of which a rank
    of causal attention has a piece of each half: three copies (mamba_context_parallel.py, pre_conv_ssm)."""
    parts = replace(
        exchange("sequence_to_heads", (source.name,), (Value("parts", out.bytes),)), launches=_PARTS
    )
    copies = Kernel(
        "order_sequence", "memory_bound", _C, ("parts",), (out,), bytes=6.0 * out.bytes,
        launches=_PARTS + 2, scratch=(("activations", out.bytes),),
    )  # fmt: skip
    return replace(parts, launches=_PARTS), copies


def _to_sequence(source: Value, out: Value) -> tuple[Kernel, Kernel]:
    """Back again: two copies, one into the order of ranks, one that joins heads (ibid., post_conv_ssm)."""
    ordered = Value("ordered", source.bytes)
    copies = Kernel(
        "order_ranks", "memory_bound", _C, (source.name,), (ordered,), bytes=4.0 * source.bytes, launches=2
    )
    return copies, exchange("heads_to_sequence", (ordered.name,), (out,))


def _turned(name: str, source: str, out: Value, back: bool) -> Kernel:
    """A copy of rows in another order by torch, which follows strides. back: of its gradient too, which a
    product wants in order (Transformer Engine reshapes it), while mamba_ssm's kernels take any strides of
    rows (ssd_combined.py, _mamba_chunk_scan_combined_bwd)."""
    moved, strided = 2.0 * out.bytes, Strided(out.bytes, 2.0 * out.bytes)
    return Kernel(
        name, "memory_bound", _C, (source,), (out,), bytes=moved, back_bytes=moved * back, strided=strided,
        back_strided=strided if back else Strided(), back_launches=int(back),
    )  # fmt: skip


def _within(how: LinearAttention, shapes: Shapes) -> LinearAttention:
    """As the scan has it: no chunk is longer than its sequence, and ranks of a sequence that are more than
    heads of keys have one each, so that heads are repeated (Megatron-Core, mamba_context_parallel.py).
    Documents in a sequence do not end chunks here."""
    ranks = shapes.tensor * shapes.sequence
    return replace(how, chunk=min(how.chunk, shapes.seq_len), num_key_heads=max(how.num_key_heads, ranks))


def _scan(how: LinearAttention, shapes: Shapes, source: Value, out: Value) -> Kernel:
    """The convolution, and the scan in chunks of Q tokens, of whose forward the backward makes all but the
    output again (mamba_ssm, ssd_combined.py: MambaSplitConv1dScanCombinedFn saves what was projected and the
    output; fla, chunk_gated_delta_rule makes states and products of a chunk again).

    Traffic of the forward, by kernel: the convolution reads and writes what it mixes; the decays of a chunk
    are added up; the state of each chunk is made, of keys and values; states are handed on, read and written;
    products of a chunk's queries and keys; the output, of all of these. The backward does all that again, and
    has for each a kernel that reads the same, the gradient of what it made, and writes those of what it read.
    """
    heads, b, Q = shapes.tensor * shapes.sequence, shapes.width, how.chunk
    rows = shapes.attended / heads
    conv = rows * how.mixed * b
    decays = rows * how.num_value_heads * _WIDE
    states, handed = rows / Q * how.state * _WIDE, rows / Q * how.state * b
    square = rows * (how.num_value_heads if how.solves else how.num_key_heads) * Q * _WIDE
    key, value = rows * how.keys * b, rows * how.values * b
    cumulated = 3.0 * decays
    made = key + value + decays + states
    passed = states + handed
    products = 2.0 * key + square
    output = square + 2.0 * decays + key + handed + 3.0 * value
    forward = 2.0 * conv + cumulated + made + passed + products + output
    steps = how.solves  # a delta rule solves a triangle of each chunk, and takes keys and values through it
    forward += steps * (square + 2.0 * (key * how.num_value_heads / how.num_key_heads + value))
    return Kernel(
        "linear_scan", "memory_bound", _C, (source.name,), (out,), saves=(source.name, out.name),
        bytes=forward, back_bytes=3.0 * forward, flops=_flops(how, rows),
        launches=7 + steps, back_launches=16 + 2 * steps,
        scratch=(("activations", int(conv + 2.0 * decays + states + handed + square)),),
        back_scratch=(("activations", int(2.0 * (conv + square + handed) + 4.0 * decays + states)),),
    )  # fmt: skip


def _flops(how: LinearAttention, rows: float) -> float:
    """Forward FLOP of `rows` tokens: states made and read, and of a chunk the products of queries and keys,
    and of these and values, of which a half is masked (arXiv 2405.21060, section 6); of a delta rule also
    those that take keys and values through the triangle of the chunk (arXiv 2412.06464)."""
    Q, inside = how.chunk, 2.0 * how.chunk * (how.keys + how.values) / 2
    solved = how.solves * 2.0 * Q * (how.num_value_heads * how.key_head_dim * 2 + how.values) / 2
    return rows * (4.0 * how.state + inside + solved)


def _gated_norm(how: LinearAttention, shapes: Shapes, values: float) -> Kernel:
    """scanned -> o: RMSNorm of each head, or group of heads, times SiLU of the gate, which it reads too."""
    groups = (how.num_value_heads if how.solves else how.num_key_heads) / shapes.tensor
    plain = norm("gated_norm", "scanned", "o", shapes.region_tokens, int(values), shapes.width, _C, groups)
    return replace(plain, bytes=1.5 * plain.bytes, back_bytes=1.5 * plain.back_moved)
