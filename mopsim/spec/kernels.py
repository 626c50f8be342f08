"""Which kernels a program runs."""

from typing import Literal

import msgspec

from mopsim.common.errors import require
from mopsim.common.io import Spec
from mopsim.spec.quantity import require_between
from mopsim.spec.sharding import MOST_BYTES

Built = Literal["fused", "composed"]
"""One kernel, or as eager torch composes it."""
AttentionKernel = Literal[
    "profile", "cpu", "flash1", "flash2", "flash3", "flash4", "cudnn", "ck", "flex", "triton", "masked",
    "unfused", "rows", "scores",
]  # fmt: skip
"""profile: the best that the hardware's profile was measured with. cpu: torch's flash kernel for CPUs, the
query heads of a KV head one after another. masked: torch's under a mask, of the whole square. unfused:
FlexAttention that nothing compiles: the whole square of scores in fp32, by operators, of which nothing is
kept. rows: blocks of query rows, as torch composes them (mopexec/operators/attention_rows.py). scores: kept
in memory, no flash kernel."""
Normed = Literal["qkv_proj", "q_a_proj", "q_b_proj", "kv_b_proj", "up_proj", "router"]
"""Products of the layers' tapes that come after a norm, in joined projections."""
EXACT = ("router", "vocabulary")
"""Components whose products are in the compute dtype under an 8-bit or 4-bit recipe."""
MOST_ROOM = 1000
DEFAULT = "default"
"""Key of what counts for every device architecture that has no entry of its own."""
BEYOND = "beyond"
"""Key of the attention kernel, on every architecture, where attention is not plain."""
WIDE = "wide"
"""The same, before all others, where products are in more than 16 bits."""


class Kernels(Spec, frozen=True, kw_only=True):
    """Which implementation runs each operation.

    norm: `fused`: one kernel. `composed`: kernels as eager torch composes them. `rounded`: composed, and
    values are rounded before the product with the weight (transformers). `upcast`: on a copy of the input
    in fp32; copy and norm are computed again in the backward, and a checkpoint keeps the input alone.
    norm_within: products (of the layers' tapes) whose kernel includes the norm before them. The norm's
    output is kept for their weight gradient, and is neither recomputed nor offloaded alone.
    head_norms: where the gradient of the weight of a norm of each head is summed. `fused`: in its kernel.
    `summed`: by one block (Transformer Engine).
    rotary: rotary embedding. `fused`: one kernel. `by_token`: a kernel with a block for each token
    (Transformer Engine). `composed`: products of complex numbers in eager torch. `halves`: products of
    halves in eager torch. `wide`: as `halves`, in fp32. `upcast`: so on copies in fp32. `gathered`: as
    `halves`, on tables of a microbatch's positions that each layer gathers and keeps.
    rotations: of queries and keys that one product makes. `together`: in one kernel. `apart`: in
    one each.
    rotary_tables: sines and cosines that a program keeps. `positions`: of a sequence's positions.
    `sequences`: where documents are packed, a table for each sequence of a microbatch, as they restart.
    qk_norms: when queries and keys are normed. `together`: once all are made. `in_turn`: each before the
    next product.
    activation: `fused`: one kernel. `composed`: kernels as eager torch composes them. `strided`: as torch
    composes it on halves of one tensor. `tanh`: as `composed`, and without a gate GELU's tanh form operation
    by operation, of which most results are kept (transformers' gelu_new). `tanh_wide`: so in fp32, as
    autocast has it.
    residual: `fused`: one kernel. `composed`: kernels as eager torch composes them. `routed`: so in layers
    with routed experts, of which a compiler has no whole graph.
    stream: dtype of the residual stream. `compute`: that of the products, but fp32 if weights that no
    rank shards are fp32, and cast for each product (autocast), as what embeddings give is not. `float32`:
    fp32.
    expert_rows: gated activation and route weights of routed experts. `fused`: one kernel. `composed`: as
    eager torch composes both. `wide`: route weights as eager torch composes them, on a kept copy in fp32;
    the activation as the field `activation` says. `added`: as `wide`, before the kernel that adds a token's
    rows; a compiler keeps the rows alone. `shifted`: gate and weight, half of it shifted (no
    bias_activation_fusion). `interleaved`: gate and up are halves in turns; in MXFP8 the activation is
    within the products, else rows are separated, gated and weighed (Transformer Engine's op fuser).
    weighted_inputs: what is kept for the gradient of route weights that multiply the inputs of experts.
    `tokens`: those whose rows are made anew. `rows`: rows as they came to their experts, where torch weighs
    them in fp32. `wide`: a copy of the rows in fp32, which are weighed before they leave.
    expert_products: `grouped`: one kernel. `torch`: torch's grouped kernel. `looped`: expert by expert
    (Transformer Engine's GroupedLinear). `modules`: expert by expert, each expert a module of its own
    (transformers 4). `batched`: experts with equal rows as one batch, at the pace of plain products.
    expert_dtype: products of routed experts under an 8-bit or 4-bit recipe. `recipe`: in its dtype.
    `compute`: in the compute dtype.
    expert_capacity: experts have room for this many times their share of each sequence's balanced load.
    They compute all of this room, whatever is routed to them, and no more. 0: no capacity, experts compute
    the rows that arrive.
    expert_masks: rows travel there and back by products with masks of a sequence's tokens and all experts'
    room (GShard).
    expert_buffers: without a capacity, the size of tensors of routed experts' rows. `fit`: the rows that
    arrive. `worst`: all rows that may arrive at a rank, with passes over all of them (jax.jit, whose shapes
    are known before).
    expert_outputs: `whole`: outputs are made in one tensor. `pieces`: they are made expert by expert and
    concatenated. The gradients of their inputs are made in the same way.
    expert_padding: `none`: rows are not padded. `aligned`: in 8 and 4 bits every expert's rows are copied
    to a multiple and back (Transformer Engine's Fp8Padding; the host must know their number). `busiest`:
    every expert of a rank computes as many rows as the busiest of them; rows are copied there and back
    slice by slice. `fresh`: as `busiest`; under a fresh router memory holds the rows of a run's most uneven
    layer, which gives every token to one expert, for each layer that keeps its rows.
    expert_weights: `whole`: weights of a grouped product are one tensor. `stacked`: they are copied into
    one before it, and its gradient is copied back.
    expert_room: tensors of routed experts' rows that HybridEP brings have room for this many times the rows
    of a balanced load, so the host need not know the number of rows. 0: room for the rows that arrive.
    expert_stash: in 8 and 4 bits, the input and output of the first product that the backward needs are
    copied to a stash. The stash has this many times a balanced load's rows (Megatron-Core's paged stash).
    0: no stash.
    expert_bias: `fused`: added inside the product. The others gather biases row by row and add them.
    `gathered`: their gradient is a product. `indexed`: torch adds up the gradient row after row. `added`:
    by atomic operations. `bulk`: by bulk reductions. `scaled`: the bias of the last product times the route
    weights, which the activation has applied, by torch for each expert.
    clamped_gate: the gate of experts with clamps around SwiGLU (gpt-oss). `fused`: one kernel. `composed`:
    as torch composes it, and the experts' biases, even if all else is compiled. `again`: composed, with a
    backward that starts from gate and up. `apart`: torch clamps before one kernel, and the host waits.
    row_sums: how the rows of a token, and of its gradient, are summed. `gathered`: they are gathered and
    added. `atomic`: by atomic operations on bf16 (torch's index_add_; under Transformer Engine's layers the
    host then cuts rows into those of each expert). `atomic_if_sparse`: atomic only if a token chooses fewer
    experts than the expert-parallel degree. `sorted`: sorted, then added one after the other (torch's
    index_put_; rows that are sent once to a rank, and gradients of compiled experts, as `atomic`).
    routes_map: how the routes that DeepEP sent become a map of experts. `fused`: in a kernel. `composed`:
    by torch's ops; the host waits for the sizes of their masks.
    sent_rows: how DeepEP's kernels send rows within a node. `whole`: all at once (ElasticBuffer). `chunks`: a
    few rows at a time to each peer, and the next once these are there (Buffer with its own configs).
    `long_chunks`: so with chunks tuned for short rows (HardwareProfile.scale_up.rounds).
    beside_rows: tensors that an all-to-all sends beside rows. `counts`: each rank's counts, gathered by all
    ranks unless the host never reads them. `weights`: weights of routes, twice.
    top_k: how a router chooses experts. `fused`: a kernel at the rate of memory. `torch`: torch.topk, a
    block of threads for each token.
    router: `fused`: the input of the router's product is cast to fp32 inside the product. `composed`: it is
    cast before, and kept.
    sequence_slices: if ranks gather or send on keys and values. `paired`: each rank has an early and a late
    part of a sequence. `in_order`: the parts lie one after the other, so the last rank attends to the most
    keys.
    sequence_exchange: `fused`: Ulysses' tensors travel in one exchange. `composed`: one by one, with copies
    on both sides.
    scan_rows: how rows lie where a scan of linear attention begins. `by_sequence`: sequence after sequence,
    as its kernels take them. `by_token`: token by token, so that rows of several sequences are copied before
    and after it.
    gathered_rows: rows that a region of split products gathers under sequence parallelism. `again`: they
    are gathered again for the weight gradients (Megatron-Core's autograd function). `kept`: they are kept
    (plain autograd).
    region_backward: in the backward a region gathers its rows again and scatters the gradient of their
    input. `beside`: beside the products. `in_turn`: one after the other. `queued`: beside them where what is
    issued first starts first: from Blackwell on, on cards of other vendors, or in one queue
    (HostCosts.queues); else in turn.
    region_inputs: without sequence parallelism, the input of a region. `shared`: its products read it.
    `copied`: each product that gate_up makes separate reads and keeps a copy of its own, and the gradient of
    what ends a region is copied (Paddle's c_identity).
    region_sums: without sequence parallelism, the sum of the gradient of a region's input. `once`: one sum.
    `each`: one for each product that gate_up makes separate.
    region_rows: under sequence parallelism, such separate products. `once`: they share the gathered rows
    and scatter the sum of their inputs' gradients. `scattered`: each scatters its own gradient. `each`:
    each gathers too.
    exchanged_rows: additional treatment of rows that tensor-parallel ranks exchange. `ordered`: a copy puts
    them in order if a microbatch has several sequences (torch's functional collectives; not in tensor
    overlap). `cast`: they are gathered in 8 bits (torchao). `quantized`: they are gathered in the recipe's
    dtype (Transformer Engine). `routed`: split experts exchange tokens, with all routes.
    gate_up: `joined`: one product for gate and up, and one for queries, keys and values. `separate`: one
    product each, shared experts after the routed experts. `added`: one product each, counted as one whose
    input's gradients are added. `ffn_added`: as `added`, for gate and up only.
    qkv_split: the parts of the joined product for queries, keys and values. `fused`: they are read in
    place, and their gradients are written in place. `views`: torch splits them and concatenates their
    gradients. `kept`: as `views`, and attention keeps values in place, with all of the projection.
    `copied`: as `views`, and tensors that attention needs contiguous are copied too.
    grouped_heads: `shared`: keys and values that query heads share are read by all of them. `repeated`:
    they are repeated for each before the attention.
    softmax: of attention scores that are kept (attention `scores`). `fused`: scaled and masked in one
    kernel (Megatron-LM). `composed`: scaled, masked and their softmax by torch. `upcast`: so, and the
    softmax is of a cast to fp32, as autocast has it too; its result is kept in fp32 and cast back.
    narrow_values: values of latent attention, which are narrower than its keys. `kept`: the attention reads
    them as they are. `padded`: its kernel takes one width: values, output and the output's gradient are
    copied beside zeros, and back.
    attention_rows: `tokens`: queries reach the attention laid out by tokens. `heads`: by heads; the output
    is then copied to lie by tokens. `sequences`: by tokens, and where a microbatch has several sequences
    the output and its gradient are laid out twice on their way.
    casts: the operand that the weight gradient of a product in 8 or 4 bits uses. `kept`: the cast copy of
    the input is kept (Transformer Engine). `again`: the input is kept and cast again, and each copy is laid
    out again for the product that reads it the other way (torchao). `made`: as `again`, cast from a tensor
    that a norm or a gate keeps anyway; of a plain copy the cast is kept (torchao compiled). `composed`: as
    `again`, and eager torch casts each operand of each product in fp8, weights too, by kernels of its own.
    cast_scales: scales of casts that are not kept. `tensor`: one for a tensor. `rows`: one for each row
    that a product sums over. Weights are then cast in every pass and gradients of outputs for each product.
    Gradients are multiplied by the factors of both operands' rows afterwards, in the kernel that reads them
    next if that is compiled.
    scale_updates: kernels that update scales in each pass of a layer whose products are in FP8 with delayed
    scales (Transformer Engine until v1.5).
    scale_sums: after each pass of a model chunk the largest values of delayed scales are reduced, and
    compute waits. `tensor`: over tensor-parallel ranks. `world`: over the ranks of the stage. `none`:
    never.
    weight_casts: `step`: weights are cast once a step, which is not counted. `pass`: in every forward pass.
    `kept`: there is a cast copy of each weight, kept for the backward (in both layouts if casts are kept).
    `cached`: there is a cast copy for good. `rows`: so, of FP8 in one layout. `only`: the cast copy is the
    parameter: none is wider. It is made of masters that ranks shard, and `cached` where none do (ZeRO-0).
    autocast: weights that no rank shards are cast for each product, and the casts are kept for the backward
    (torch.autocast), where state is wider than the products.
    weight_grads: `fused`: gradients are added to their buffer inside the product. `composed`: after it.
    adamw: `fused`: one kernel. `foreach`: operation by operation over all tensors, with the roots of all
    second moments beside (torch's default). `looped`: over one tensor after the other, with two copies.
    `widened`: in one kernel on fp32 copies of narrower moments, parameter by parameter; a wider master is
    then stored as the bits that the parameter lacks (Transformer Engine).
    ring_blocks: how blocks of keys and values are merged under context parallelism. `fused`: one kernel.
    `composed`: kernels as eager torch composes them. `scripted`: in one kernel that torch fuses, after a
    cast to fp32 (ring-flash-attn). `joined`: each output is joined to those before by torch, in fp32.
    loss: cross entropy. `composed`: torch's, several kernels with copies in fp32. `in_place`: Megatron-LM's
    vocab_parallel_cross_entropy, in place on one copy in fp32 of the logits or a rank's slice of them.
    `shifted`: so, and the maximum is subtracted from the copy into another one (Megatron-LM from 2022 to June
    2024). `log_probs`: log-probabilities step by step: three fp32 tensors live at once (cast, shifted,
    log-probabilities); the softmax is kept for backward (NeMo-Aligner). `slices_in_place`: `in_place` of
    slices, whole logits as `composed`. `fused`: one kernel that overwrites the logits. `upcast`: one kernel
    on a copy of the logits in fp32. `compiled`: kernels that torch compiles. `native`: Megatron-Core's
    compiled kernels, whose gradient takes a second copy. `gathered`: torch's, on a copy in fp32 of logits
    that every tensor-parallel rank gathers whole. `loss_parallel`: torch's, on a copy in fp32 of a rank's
    slice of the logits (torch.distributed.tensor; whole logits as `composed`).
    loss_copy: torch's cross entropy works on a copy in fp32. false: on the logits in their own dtype.
    `picked`: its log_softmax does, and what it picks from is cast to fp32 (torch.autocast).
    logit_grads: where the gradient of logits is made by losses that are one kernel (`fused`, `upcast`,
    `compiled`, `native`, `gathered`). `in_place`: over the logits. `apart`: in a tensor of its own.
    `in_place_if_whole`: over the logits unless ranks shard gradients.
    logits_held: what the caller of a loss that works on a copy of the logits holds. true: the logits.
    `copy`: that copy. `pipelines`: the logits, in pipelines alone. false: neither.
    logits_until: how long held logits stay. `backward`: until the loss's backward is done. `next`: until
    the next microbatch's logits are made, since a loop keeps them in a variable (not in pipelines).
    logits_cut: labels are shifted by cutting rows off the copy of a loss in one kernel. Its gradient is
    then written into zeros of all the copy's rows.
    logit_passes: bytes moved for each logit in addition to those that the loss moves (casts, accuracy,
    perplexity).
    loss_chunks: a chunked loss. `fused`: its own kernels. `composed`: torch's cross entropy of each chunk
    on a copy in fp32. `autograd`: as `composed`, with gradients made separately, and those of the chunks'
    inputs concatenated in fp32. `compiled`: as `autograd`, compiled. `wide`: all in fp32 under a
    checkpoint.
    attention: the attention kernel, by device architecture (`ampere`, `hopper`, ...). `default`: all other
    architectures. `beyond`: all architectures if attention is not plain (TrainSpec.plain_attention).
    `wide`: all architectures if products are in more than 16 bits, which few kernels take.
    sinks: attention sinks. `fused`: applied in the attention kernel. `composed`: applied to its output, of
    which a copy is kept.
    deterministic: sums run in a fixed order.
    compiled: torch.compile makes one kernel of the operations between products and operators that it leaves
    alone. This includes the weights of `added` rows (read by index), `composed` sinks, a gathered bias with
    the operations after it, and scales of rows with the rows.
    fills: new tensors of a known value are written first.
    """

    norm: Literal["fused", "composed", "rounded", "upcast"] = "fused"
    norm_within: tuple[Normed, ...] = ()
    head_norms: Literal["fused", "summed"] = "fused"
    rotary: Literal["fused", "by_token", "composed", "halves", "wide", "upcast", "gathered"] = "fused"
    rotations: Literal["together", "apart"] = "together"
    rotary_tables: Literal["positions", "sequences"] = "positions"
    qk_norms: Literal["together", "in_turn"] = "together"
    activation: Literal["fused", "composed", "strided", "tanh", "tanh_wide"] = "fused"
    residual: Literal["fused", "composed", "routed"] = "fused"
    stream: Literal["compute", "float32"] = "compute"
    expert_rows: Literal["fused", "composed", "wide", "added", "shifted", "interleaved"] = "fused"
    weighted_inputs: Literal["tokens", "rows", "wide"] = "tokens"
    expert_products: Literal["grouped", "torch", "looped", "modules", "batched"] = "grouped"
    expert_dtype: Literal["recipe", "compute"] = "recipe"
    expert_capacity: float = 0.0
    expert_masks: bool = False
    expert_buffers: Literal["fit", "worst"] = "fit"
    expert_outputs: Literal["whole", "pieces"] = "whole"
    expert_padding: Literal["none", "busiest", "fresh", "aligned"] = "none"
    expert_weights: Literal["whole", "stacked"] = "whole"
    expert_room: float = 0.0
    expert_stash: float = 0.0
    expert_bias: Literal["fused", "gathered", "indexed", "added", "bulk", "scaled"] = "fused"
    clamped_gate: Literal["fused", "composed", "again", "apart"] = "fused"
    row_sums: Literal["gathered", "atomic", "sorted", "atomic_if_sparse"] = "gathered"
    routes_map: Built = "fused"
    sent_rows: Literal["whole", "chunks", "long_chunks"] = "whole"
    beside_rows: tuple[Literal["counts", "weights"], ...] = ()
    top_k: Literal["fused", "torch"] = "fused"
    router: Built = "fused"
    sequence_slices: Literal["paired", "in_order"] = "paired"
    sequence_exchange: Built = "fused"
    scan_rows: Literal["by_sequence", "by_token"] = "by_sequence"
    gathered_rows: Literal["again", "kept"] = "again"
    region_backward: Literal["beside", "in_turn", "queued"] = "beside"
    region_inputs: Literal["shared", "copied"] = "shared"
    region_sums: Literal["once", "each"] = "once"
    region_rows: Literal["once", "scattered", "each"] = "once"
    exchanged_rows: tuple[Literal["ordered", "cast", "quantized", "routed"], ...] = ()
    gate_up: Literal["joined", "added", "ffn_added", "separate"] = "joined"
    qkv_split: Literal["fused", "views", "kept", "copied"] = "fused"
    grouped_heads: Literal["shared", "repeated"] = "shared"
    softmax: Literal["fused", "composed", "upcast"] = "fused"
    narrow_values: Literal["kept", "padded"] = "kept"
    attention_rows: Literal["tokens", "heads", "sequences"] = "tokens"
    casts: Literal["kept", "again", "made", "composed"] = "kept"
    cast_scales: Literal["tensor", "rows"] = "tensor"
    scale_updates: int = 0
    scale_sums: Literal["none", "tensor", "world"] = "none"
    weight_casts: Literal["step", "pass", "kept", "cached", "rows", "only"] = "step"
    autocast: bool = False
    weight_grads: Built = "fused"
    adamw: Literal["fused", "foreach", "looped", "widened"] = "fused"
    ring_blocks: Literal["fused", "composed", "scripted", "joined"] = "fused"
    loss: Literal[
        "composed",
        "shifted",
        "log_probs",
        "fused",
        "upcast",
        "compiled",
        "native",
        "gathered",
        "loss_parallel",
        "in_place",
        "slices_in_place",
    ] = "composed"
    loss_copy: bool | Literal["picked"] = True
    logit_grads: Literal["in_place", "apart", "in_place_if_whole"] = "in_place_if_whole"
    logits_held: bool | Literal["copy", "pipelines"] = True
    logits_until: Literal["backward", "next"] = "backward"
    logits_cut: bool = False
    logit_passes: float = 0.0
    loss_chunks: Literal["fused", "composed", "autograd", "compiled", "wide"] = "fused"
    attention: dict[str, AttentionKernel] = msgspec.field(default_factory=lambda: {DEFAULT: "profile"})
    sinks: Built = "fused"
    deterministic: bool = False
    compiled: bool = False
    fills: bool = False

    @property
    def exact(self) -> tuple[str, ...]:
        """EXACT, and what the kernels have beside them."""
        return (*EXACT, "experts") if self.expert_dtype == "compute" else EXACT

    def __post_init__(self) -> None:
        require_between(self, 0, MOST_BYTES, "logit_passes")
        require_between(self, 0, MOST_ROOM, "expert_room", "expert_stash", "expert_capacity", "scale_updates")
        rule = "are of experts with a fixed room (expert_capacity)"
        require(bool(self.expert_capacity) or not self.expert_masks, "expert_masks", self.expert_masks, rule)
        fits = not self.expert_capacity or self.expert_buffers == "fit"
        rule = f"are of experts without a capacity, and expert_capacity is {self.expert_capacity:g}"
        require(fits, "expert_buffers", self.expert_buffers, rule)
        room, stash = self.expert_room, self.expert_stash
        require(not room or room >= 1, "expert_room", room, "must be 0, or hold a balanced load: at least 1")
        rule = f"must be 0, or at least 1 and at most expert_room {room:g}"
        require(not stash or 1 <= stash <= room, "expert_stash", stash, rule)
        rule = "holds the loss's copy of the logits in fp32, which is there with loss_copy true alone"
        require(self.loss_copy is True or self.logits_held != "copy", "logits_held", self.logits_held, rule)
