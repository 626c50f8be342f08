"""The tape of latent attention to the keys that an indexer chooses (DeepSeek Sparse Attention, arXiv
2512.02556, 2.1): the latent of keys and values is one head's keys and values for all queries, into whose
space queries are taken before and outputs out of after, by the two halves of the product that makes keys and
values elsewhere."""

from msgspec.structs import replace

from mopsim.graph.region import gather
from mopsim.graph.shapes import Shapes, causal_pairs, pairs_of_a_slice
from mopsim.graph.tape import Kernel, Matmul, Value
from mopsim.spec.model import ModelSpec

_C = "attention"
INDEXER = (
    "gather_latents", "detach", "gather_index", "index_q_proj", "index_k_proj", "index_w_proj", "index_rope",
    "gather_index_keys", "index_scores",
)  # fmt: skip
"""Kernels of an indexer, and of what it chooses from."""
_PLACE, _WIDE = 4, 4
"""Bytes of the place of a chosen key, and of a sum."""


def latent_values(model: ModelSpec, shapes: Shapes) -> tuple[list[Kernel], Value, Value]:
    """From q0 [N, heads, qk] and the normed latent kvn, kva: queries qr [N, heads, rank + rope] and the keys
    that all heads share, kr [N, rank + rope]."""
    N, b, heads = shapes.region_tokens, shapes.width, model.num_attention_heads / shapes.tensor
    rank, rope, nope = model.kv_lora_rank, model.qk_rope_head_dim, model.qk_nope_head_dim
    absorbed = _by_heads("absorb_k", "q0", Value("ql", int(N * heads * rank * b)), N, rank, nope, heads, b)
    q, k = Value("qr", int(N * heads * (rank + rope) * b)), Value("kr", N * (rank + rope) * b)
    first, source = (
        ([], "kvn") if shapes.tensor == 1 or not shapes.sequence_parallel else _whole(shapes, rank)
    )
    rotated = Kernel(
        "rope", "memory_bound", _C, ("q0", "ql", source, "kva"), (q, k), bytes=2.0 * (q.bytes + k.bytes),
        launches=2 if shapes.fused else 10, back_launches=2 if shapes.fused else 14,
    )  # fmt: skip
    return [absorbed, *first, rotated], q, k


def _whole(shapes: Shapes, rank: int) -> tuple[list[Kernel], str]:
    """The latent of all rows of a tensor-parallel region."""
    out = Value("kvng", shapes.region_tokens * rank * shapes.width)
    return [gather("gather_kv", "kvn", out, _C)], out.name


def _by_heads(
    name: str, source: str, out: Value, tokens: float, n: float, k: float, heads: float, b: int
) -> Kernel:
    """A product of each head's rows with a matrix of its own."""
    return Kernel(
        name, "matmul", _C, (source,), (out,), saves=(source,), matmuls=(Matmul(tokens, n, k, heads),),
        weight_grad=int(heads * n * k * b),
    )  # fmt: skip


def sparse_core(model: ModelSpec, shapes: Shapes, layer: int, q: Value, k: Value) -> list[Kernel]:
    """o [N, heads, v]: keys gathered over the ranks of a sequence, those chosen for each query, the attention
    to them, the values taken out of the latent. A layer without an indexer attends to what the last one
    before it chose. The backward adds up the gradient of the shared keys in fp32."""
    N, b, d = shapes.region_tokens, shapes.width, shapes.sequence
    heads, rank = model.num_attention_heads / shapes.tensor, model.kv_lora_rank
    seen = Value("kg", k.bytes * d) if d > 1 else k
    kernels = [_gathered("gather_latents", k, seen)] if d > 1 else []
    kernels += indexer(model, shapes) if model.chooses(layer) else []
    chosen = ("chosen",) if model.chooses(layer) else ()
    out, lse = Value("ol", int(N * heads * rank * b)), Value("lse", int(N * heads * _WIDE), grad=False)
    pairs = _pairs(shapes, model.sparse_attention.index_topk)
    kernels.append(
        Kernel(
            "attention_core", "attention", _C, (q.name, seen.name, *chosen), (out, lse),
            saves=(q.name, seen.name, out.name, lse.name, *chosen), seq=_most(model, shapes),
            flops=2 * pairs * heads * (2 * rank + model.qk_rope_head_dim),
            bytes=float(q.bytes + seen.bytes + out.bytes + N * _most(model, shapes) * _PLACE),
            back_scratch=(("activations", seen.bytes // b * _WIDE),),
        )
    )  # fmt: skip
    v = model.v_head_dim
    kernels.append(_by_heads("absorb_v", "ol", Value("o", int(N * heads * v * b)), N, v, rank, heads, b))
    return kernels


def _gathered(name: str, own: Value, whole: Value) -> Kernel:
    return Kernel(
        name, "all_gather", _C, (own.name,), (whole,), bytes=float(whole.bytes), group="sequence",
        back_kind="reduce_scatter",
    )  # fmt: skip


def _most(model: ModelSpec, shapes: Shapes) -> int:
    """Keys that are chosen for a query."""
    return min(model.sparse_attention.index_topk, shapes.seq_len)


def _pairs(shapes: Shapes, most: int) -> float:
    """Pairs of a query and a key of the busiest rank, of at most `most` keys a query (0: all before it)."""
    seq, d = shapes.seq_len, shapes.sequence
    inside = bool(shapes.documents) and (most == 0 or shapes.documents <= most)
    band = (shapes.documents, True) if inside else (most, False)
    each = pairs_of_a_slice(seq, d, shapes.in_order, *band) if d > 1 else causal_pairs(seq, *band)
    return each * shapes.attended / seq


def indexer(model: ModelSpec, shapes: Shapes) -> list[Kernel]:
    """The places [N, topk] of the keys that each query attends to. Every tensor-parallel rank has all heads,
    of all rows, and nothing goes back to the layer (Megatron-LM,
    transformer/experimental_attention_variant/dsa.py: x and qr are detached). What it learns from is the
    attention among the keys that it chose, whose scores are made again, as its own are, before their
    gradients (ibid., ops/attention/dsa)."""
    N, H, b, how = shapes.region_tokens, model.hidden_size, shapes.width, model.sparse_attention
    heads, width, learns = how.index_n_heads, how.index_head_dim, how.indexer_loss != "none"
    apart: tuple[Value, ...] = (Value("h_apart", 0, grad=False), Value("qn_apart", 0, grad=False))
    kernels = [Kernel("detach", "view", _C, ("h", "qn"), apart)]
    if shapes.tensor > 1 and shapes.sequence_parallel:
        sizes = {"h_index": H, "qn_index": model.q_lora_rank}
        whole = tuple(Value(name, N * size * b, grad=False) for name, size in sizes.items())
        gathered = Kernel(
            "gather_index", "all_gather", _C, tuple(one.name for one in apart), whole, group="tensor",
            bytes=float(sum(one.bytes for one in whole)), launches=2, back_bytes=0.0, back_launches=0,
        )  # fmt: skip
        kernels, apart = [*kernels, gathered], whole
    hidden, latent = (one.name for one in apart)
    products = {
        "q": (latent, "qn", heads * width, model.q_lora_rank),
        "k": (hidden, "h", width, H),
        "w": (hidden, "h", heads, H),
    }
    for name, (source, saved, n, k) in products.items():
        kernels.append(
            Kernel(
                f"index_{name}_proj", "matmul", _C, (source,), (Value(f"i{name}0", N * n * b, grad=learns),),
                saves=(saved,) if learns else (), weight_grad=n * k * b * learns,
                matmuls=(Matmul(N, n, k, constant=True, frozen=not learns),),
            )
        )  # fmt: skip
    queries, keys = Value("iq", N * heads * width * b, grad=learns), Value("ik", N * width * b, grad=learns)
    moved = 4.0 * (queries.bytes + 2 * keys.bytes)
    # the key's LayerNorm, rotary positions, a Hadamard transform of both
    turned = Kernel(
        "index_rope", "memory_bound", _C, ("iq0", "ik0"), (queries, keys),
        saves=("ik0",) if learns else (), launches=6, bytes=moved, back_bytes=moved * learns,
        back_launches=6 * learns,
    )  # fmt: skip
    kernels.append(turned)
    if shapes.sequence > 1:
        sent = _gathered(
            "gather_index_keys", keys, replace(keys, name="ikg", bytes=keys.bytes * shapes.sequence)
        )
        kernels.append(sent if learns else replace(sent, back_bytes=0.0, back_launches=0))
        (keys,) = sent.writes
    among = _pairs(shapes, how.index_topk) * learns
    teacher = model.num_attention_heads * (model.kv_lora_rank + model.qk_rope_head_dim)
    chosen = Value("chosen", N * _most(model, shapes) * _PLACE, grad=False)
    kernels.append(
        Kernel(
            "index_scores", "attention", _C, ("iq", keys.name, "iw0"), (chosen,), indexer=True, launches=2,
            saves=("iq", keys.name, "iw0") if learns else (), seq=_most(model, shapes),
            flops=2 * _pairs(shapes, 0) * heads * width,
            back_flops=2 * among * (teacher / shapes.tensor + 3 * heads * width),
            bytes=float(queries.bytes + keys.bytes + chosen.bytes), back_launches=4 * learns,
        )
    )  # fmt: skip
    return kernels
