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
    "scores",
]  # fmt: skip
"""profile: the best that the hardware's profile was measured with. cpu: torch's flash kernel for CPUs, the
query heads of a KV head one after another. masked: torch's under a mask, of the whole square. scores: kept in
memory, no flash kernel."""
Normed = Literal["qkv_proj", "q_a_proj", "q_b_proj", "kv_b_proj", "up_proj", "router"]
"""Products of the layers' tapes that come after a norm, in joined projections."""
MOST_ROOM = 1000
DEFAULT = "default"
"""Key of what counts for every device architecture that has no entry of its own."""
BEYOND = "beyond"
"""Key of the attention kernel, on every architecture, where attention is not plain."""


class Kernels(Spec, frozen=True, kw_only=True):
    """Which implementation runs each operation.

    norm, rotary, activation, residual: one kernel, or as eager torch composes it; a norm whose values are
    rounded before the product with the weight (`rounded`, transformers), or on a copy of its input in fp32,
    both made again in the backward, of which a checkpoint keeps the input alone (`upcast`); rotary embedding
    by products of complex numbers (`composed`) or of halves (`halves`), or in a kernel with a block for each
    token (`by_token`, Transformer Engine). stream: of the residual stream, as the products' or in fp32, as
    autocast leaves it where weights are. norm_within: products (of the layers' tapes) whose kernel has the
    norm before them in it: its output is kept for their weight gradient, and is neither recomputed nor
    offloaded alone. head_norms: the gradient of the weight of a norm of each head is summed in its kernel, or
    by one block (`summed`, Transformer Engine). activation: or as torch composes it on halves of one tensor
    (`strided`). router: its product's input is cast to fp32 and kept (`composed`), or cast inside it.
    attention: by device architecture (`ampere`, `hopper`, ...), `default` for the others, `beyond` for all
    where it is not plain (TrainSpec.plain_attention). sinks: those of attention are applied in its kernel, or
    to its output, of which a copy is kept. deterministic: sums in a fixed order. compiled: torch.compile
    makes one kernel of what lies between products and operators that it leaves alone: of the weights of
    `added` rows, which it reads by index, of `composed` sinks, of a gathered bias with what follows it, and
    of scales of rows with what they scale. expert_rows: gated activation and route weights of routed experts,
    or weights alone, on a kept copy in fp32 (`wide`), so before what adds a token's rows (`added`, of which a
    compiler keeps the rows alone), or gate and weight, half of it shifted (`shifted`, no
    bias_activation_fusion), or halves in turns (`interleaved`): in MXFP8 within the products, else put apart,
    gated and weighed (Transformer Engine's op fuser). expert_products: `grouped` in one kernel, or by torch's
    (`torch`), `looped` expert by expert (Transformer Engine's GroupedLinear), `modules` so too, each a module
    of its own (transformers 4), or of experts with equal rows as one batch at the pace of plain products
    (`batched`). expert_capacity: experts have room for so many times their share of each sequence's balanced
    load, compute all of it, whatever is routed to them, and no more (0: what comes). expert_masks: rows go
    there and back by products with masks of a sequence's tokens and all experts' room (GShard).
    expert_buffers: without a capacity, tensors of routed experts' rows fit what comes (`fit`), or all that
    may come to a rank, with passes over all of it (`worst`, jax.jit, whose shapes are known before).
    expert_outputs: made in one tensor (`whole`), or expert by expert and put together (`pieces`), as are the
    gradients of their inputs. expert_padding: in 8 and 4 bits every expert's rows are copied to a multiple of
    theirs and back (`aligned`, Transformer Engine's Fp8Padding, where the host knows their number); or every
    expert of a rank computes as many rows as the `busiest` of them; under
    a `fresh` router memory holds those of a run's most uneven layer, which gives every token to one expert,
    for each layer that keeps its rows; rows are copied there and back slice by slice. expert_weights: those
    of a grouped product are one tensor, or are copied into one before it, and its gradient back (`stacked`).
    expert_room: tensors of routed experts' rows that HybridEP brings have room for so many times those of a
    balanced load (0: for as many as come), so that no host need know how many these are. expert_stash: of
    these, in 8 and 4 bits, what the backward wants of the first product's input and output is copied to a
    stash, which has so many times a balanced load's (0: there is none; Megatron-Core's paged stash).
    expert_bias: added inside the product (`fused`), or gathered row by row and added; then its gradient is a
    product (`gathered`), or torch adds it up row after row (`indexed`), by atomic operations (`added`) or by
    bulk reductions (`bulk`); or that of the last product times the route weights, which the activation has
    applied, by torch for each expert (`scaled`). clamped_gate: that of experts with clamps around SwiGLU
    (gpt-oss) in one kernel, or as torch composes it, or so with a backward that starts from gate and up
    (`again`), or torch clamps before one kernel and the host waits (`apart`). row_sums: rows of a token, and
    of its gradient, are gathered and added, or added by atomic operations on bf16 (`atomic`, torch's
    index_add_; under Transformer Engine's layers the host then cuts rows into those of each expert), or that
    only where a token chooses fewer experts than the expert-parallel degree (`atomic_if_sparse`), or one
    after the other once sorted (`sorted`, torch's index_put_; those sent once to a rank and gradients of
    compiled experts as `atomic`). routes_map: what DeepEP sent becomes a map of experts in a kernel, or by
    torch's ops, for whose masks' sizes the host waits. beside_rows: what an all-to-all sends beside rows:
    each rank's `counts`, gathered by all but where the host never reads them, and `weights` of routes, twice.
    gathered_rows: those that a region of split products gathers under sequence parallelism are gathered
    `again` for the weight gradients (Megatron-Core's autograd function), or `kept` (plain autograd).
    region_backward: what begins a region gathers its rows again and scatters their input's gradient beside
    the products, or one after the other. region_sums: without sequence parallelism the input's gradient of a
    region is summed `once`, or that of each product that gate_up says is one of its own (`each`).
    region_rows: under sequence parallelism such products share what is gathered and scatter the sum of their
    inputs' gradients (`once`), or scatter each its own (`scattered`), or gather too (`each`). exchanged_rows:
    what is done to those beside: put in order by a copy where a microbatch has several sequences (`ordered`,
    torch's functional collectives; not in tensor overlap), or gathered in 8 bits (`cast`, torchao) or as the
    recipe has them (`quantized`, Transformer Engine); of split experts tokens, with all routes (`routed`).
    sequence_slices: where ranks gather or send on keys and values, each has an early and a late part of a
    sequence (`paired`), or they lie one after the other, so that the last attends to the most (`in_order`).
    sequence_exchange: Ulysses' tensors in one exchange, or one by one with copies on both sides (`composed`).
    gate_up: one product for both, and one for queries, keys and values, or one each, shared experts after the
    routed ones; or one each that are counted as one whose input's gradients are added (`added`), gate and up
    only in `ffn_added`. qkv_split: parts of the one for queries, keys and values are read where they lie, and
    their gradients written so; or torch splits them and puts their gradients together (`views`), and
    attention keeps values as they lie, with all of the projection (`kept`), or what it wants contiguous is
    copied too (`copied`). grouped_heads: keys and values that query heads share are read by all of them, or
    repeated for each before the attention (`repeated`). attention_rows: queries reach the attention laid out
    by `tokens`, or by `heads`, whose output is then copied to lie by tokens. casts: the copy in 8 or 4 bits
    of a product's input is kept for its weight gradient (`kept`, Transformer Engine), or the input is, and
    cast again, each copy laid out again for the product that reads it the other way (`again`, torchao), from
    what a norm or a gate keeps anyway, and of a plain copy the cast is kept (`made`, torchao compiled).
    cast_scales: of casts that are not kept, one a tensor, or one for each of the rows that a product sums
    over, so that weights are cast in every pass, gradients of outputs for each product, and gradients
    multiplied by the factors of both operands' rows afterwards, in what reads them next where that is
    compiled (`rows`). weight_casts: weights are cast once a step, which is not counted (`step`), or in every
    forward pass (`pass`), or there is a copy, kept for the backward, of each (`kept`; in both layouts where
    casts are), or for good (`cached`). scale_updates: kernels by which scales are updated in each pass of a
    layer whose products are in FP8 with delayed scales (Transformer Engine until v1.5). scale_sums: after
    each pass of a model chunk their largest values are reduced over tensor-parallel ranks (`tensor`) or those
    of the stage (`world`), while what follows waits. weight_grads: added to their buffer inside the product,
    or after it.
    adamw: in one kernel, or operation by operation over all tensors, with the roots of all second moments
    beside (`foreach`, torch's default), or over one after the other, with two copies (`looped`); or in one
    kernel on copies in fp32 of narrower moments, parameter by parameter, beside which a wider master is the
    bits that the parameter lacks (`widened`, Transformer Engine). loss: cross entropy by several kernels with
    copies in fp32 (`composed`), by those from whose copy the maximum is subtracted into another (`shifted`,
    Megatron-LM from 2022 to June 2024), one kernel in place of the logits (`fused`), one on a copy of them in
    fp32 (`upcast`), those that torch compiles (`compiled`), Megatron-Core's compiled ones, whose gradient
    takes a second copy (`native`), torch's on a copy in fp32 of logits that every tensor-parallel rank
    gathers whole (`gathered`), or on that of a slice of them (`loss_parallel`, torch.distributed.tensor's;
    whole ones as `composed`). loss_copy: whether torch's works on a copy in fp32, or on the logits in their
    own dtype. logits_held: who calls a loss that works on a copy of the logits holds them, or that copy
    (`copy`), or does so in pipelines alone (`pipelines`). logits_until: what is held of them is there until
    the loss's backward is done, or until the `next` microbatch's are made, as a loop keeps them in a variable
    (not in pipelines). logits_cut: labels are shifted by cutting rows off the copy of a loss in one kernel,
    whose gradient is then put into zeros of all its rows. logit_passes: bytes moved for each logit beside
    what the loss moves (casts, accuracy, perplexity). loss_chunks: those of a chunked loss, or torch's cross
    entropy of each chunk on a copy in fp32, its gradients made apart and those of the chunks' inputs put
    together in fp32 (`autograd`), compiled or not, or all in fp32 under a checkpoint (`wide`). ring_blocks:
    merging blocks of keys and values where context parallelism gathers them. fills: new tensors of a known
    value are written first.
    """

    norm: Literal["fused", "composed", "rounded", "upcast"] = "fused"
    norm_within: tuple[Normed, ...] = ()
    head_norms: Literal["fused", "summed"] = "fused"
    rotary: Literal["fused", "by_token", "composed", "halves"] = "fused"
    activation: Literal["fused", "composed", "strided"] = "fused"
    residual: Built = "fused"
    stream: Literal["compute", "float32"] = "compute"
    expert_rows: Literal["fused", "composed", "wide", "added", "shifted", "interleaved"] = "fused"
    expert_products: Literal["grouped", "torch", "looped", "modules", "batched"] = "grouped"
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
    beside_rows: tuple[Literal["counts", "weights"], ...] = ()
    router: Built = "fused"
    sequence_slices: Literal["paired", "in_order"] = "paired"
    sequence_exchange: Built = "fused"
    gathered_rows: Literal["again", "kept"] = "again"
    region_backward: Literal["beside", "in_turn"] = "beside"
    region_sums: Literal["once", "each"] = "once"
    region_rows: Literal["once", "scattered", "each"] = "once"
    exchanged_rows: tuple[Literal["ordered", "cast", "quantized", "routed"], ...] = ()
    gate_up: Literal["joined", "added", "ffn_added", "separate"] = "joined"
    qkv_split: Literal["fused", "views", "kept", "copied"] = "fused"
    grouped_heads: Literal["shared", "repeated"] = "shared"
    attention_rows: Literal["tokens", "heads"] = "tokens"
    casts: Literal["kept", "again", "made"] = "kept"
    cast_scales: Literal["tensor", "rows"] = "tensor"
    scale_updates: int = 0
    scale_sums: Literal["none", "tensor", "world"] = "none"
    weight_casts: Literal["step", "pass", "kept", "cached"] = "step"
    weight_grads: Built = "fused"
    adamw: Literal["fused", "foreach", "looped", "widened"] = "fused"
    ring_blocks: Built = "fused"
    loss: Literal[
        "composed", "shifted", "fused", "upcast", "compiled", "native", "gathered", "loss_parallel"
    ] = "composed"
    loss_copy: bool = True
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
        rule = "holds the loss's copy of the logits in fp32, which loss_copy false has not"
        require(self.loss_copy or self.logits_held != "copy", "logits_held", self.logits_held, rule)
