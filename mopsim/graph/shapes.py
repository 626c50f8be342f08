"""Shapes: what of a model one rank works on, which the tapes of the layers are drawn from."""

from msgspec import Struct

from mopsim.spec.model import ModelSpec


class Shapes(Struct, frozen=True):
    """tokens: of this rank outside tensor-parallel regions. seq_len: of the whole sequence.

    sequence: ranks that share a sequence. tensor: ranks that split heads and FFN width. expert_tensor:
    ranks that split an expert's width. sequence_parallel: the ranks of `tensor` split the rows outside of
    their regions. width: bytes of an activation element. wide: bytes of the router's
    and the loss's numbers. exchange: how the ranks of a sequence trade keys and values (Attention.exchange).
    fused: one product for q, k and v, one for gate and up, one kernel for the rotary embedding and for
    SwiGLU, as Megatron-Core and compiled graphs run them. flash: see Attention.flash. softmax: see
    Kernels.softmax. in_order: ranks that trade keys and values have slices one after the other, of which the
    last attends to the most.
    whole_experts: ranks that split experts gather tokens before the router, no rows of routes.
    documents: tokens of the documents that attention does not cross, 0 where it sees the whole sequence.
    skips: whether its kernel leaves out what a window or a document hides. separate: routed experts have a
    product each for gate and up, and attention's backward makes the gradients of keys and values for each
    query head, whatever is fused. accumulates: it adds gradients up
    beside those that it returns, as flash kernels for GPUs do, which take half precision. packed: a sequence
    is of documents that attention does not cross, whether or not it is known how long they are. by_rows: it
    runs block by block of query rows, with all heads that share keys in one product. unfused: see
    Kernels.attention. by_token: see Kernels.scan_rows. rotates_apart: see Kernels.rotations.
    """

    tokens: int
    seq_len: int
    sequence: int = 1
    tensor: int = 1
    expert_tensor: int = 1
    width: int = 2
    wide: int = 4
    exchange: str = "ulysses"
    fused: bool = False
    flash: bool = True
    softmax: str = "fused"
    sequence_parallel: bool = True
    in_order: bool = False
    whole_experts: bool = False
    documents: int = 0
    skips: bool = True
    separate: bool = False
    accumulates: bool = True
    packed: bool = False
    by_rows: bool = False
    unfused: bool = False
    by_token: bool = False
    rotates_apart: bool = False

    @property
    def region_tokens(self) -> int:
        """Tokens inside a tensor-parallel region, where the sequence split of the group is gathered."""
        return self.tokens * self.tensor if self.sequence_parallel else self.tokens

    @property
    def attended(self) -> int:
        """Tokens whose attention this rank computes, for its share of the heads."""
        return self.region_tokens * self.sequence

    def band(self, model: ModelSpec, layer: int) -> tuple[int, bool]:
        """Tokens of what a query of a layer attends to, 0: all before it; whether they are chunks. Documents
        are chunks of one length; a window that is shorter than they are counts whole. None where the kernel
        computes what is hidden too."""
        if not self.skips:
            return 0, False
        width = model.window(layer)
        if self.documents and (width == 0 or self.documents <= width):
            return self.documents, True
        return width, model.attention_chunk_size > 0


def causal_pairs(seq_len: int, window: int = 0, chunked: bool = False) -> float:
    """Query-key pairs of one causal sequence: S(S+1)/2, or of a band `window` wide; chunked: of chunks of so
    many tokens, each by itself."""
    if window == 0 or window >= seq_len:
        return seq_len * (seq_len + 1) / 2
    if chunked:
        return seq_len // window * causal_pairs(window) + causal_pairs(seq_len % window)
    return window * (window + 1) / 2 + (seq_len - window) * window


def pairs_of_a_slice(
    seq_len: int, ranks: int, in_order: bool, window: int = 0, chunked: bool = False
) -> float:
    """Query-key pairs of the busiest of the ranks that share a causal sequence. in_order: see Shapes; that is
    the last, but with chunks, of which its slice may have the beginning of one."""
    if not in_order:
        return causal_pairs(seq_len, window, chunked) / ranks
    ends = range(seq_len, 0, -(seq_len // ranks)) if chunked else (seq_len,)
    return max(
        causal_pairs(end, window, chunked) - causal_pairs(end - seq_len // ranks, window, chunked)
        for end in ends
    )


def attended_span(seq_len: int, window: int = 0, chunked: bool = False) -> int:
    """The causal sequence without a window whose queries see as many keys on average: tiles of a band's edges
    are computed whole, as those of the diagonal are, so that a kernel is as efficient on the two."""
    if window == 0 or window >= seq_len:
        return seq_len
    return window if chunked else round(2 * causal_pairs(seq_len, window) / seq_len)


def attention_widths(model: ModelSpec) -> tuple[int, int]:
    """(query-key, value) elements of a head."""
    if model.attention == "mla":
        return model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
    return model.head_dim, model.head_dim
