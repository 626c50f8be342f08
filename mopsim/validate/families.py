"""Families of strategies as the table's columns name them -> one Strategy."""

from dataclasses import dataclass
from typing import Literal, TypeVar

from mopsim.common.errors import SpecError
from mopsim.spec.categories import MODULES
from mopsim.spec.layout import ceil_div
from mopsim.spec.model import ModelSpec
from mopsim.spec.stack import (
    DEFAULT,
    Built,
    Host,
    Kernels,
    Recompute,
    Sharding,
    Stack,
    Unfused,
)
from mopsim.spec.strategy import (
    Activations,
    Attention,
    Dense,
    Experts,
    MatmulDType,
    Optimizer,
    Overlap,
    Pipeline,
    Precision,
    Strategy,
    Vocabulary,
)  # fmt: skip
from mopsim.validate import recipes
from mopsim.validate.conventions import Conventions, conventions
from mopsim.validate.tables import UNKNOWN, Row, count, number

ZERO: dict[str, Literal[0, 1, 2, 3]] = {"none": 0, "zero1": 1, "zero2": 2, "zero3": 3}
MATMUL: dict[str, MatmulDType | Literal["compute"]] = {
    "bf16": "compute", "fp16": "compute", "fp8": "fp8", "mxfp8": "mxfp8", "nvfp4": "nvfp4",
}  # fmt: skip
UPCAST = ("halo-bench", "torchtitan")
"""Sources whose fused loss works on logits in fp32: transformers casts them before Liger's kernel, a compiled
loss makes the one-hot matrix of its labels in that dtype."""
#: "selective" without a list of modules: Megatron's core attention.
SELECTIVE = {"megatron": "core_attn", "fsdp": "mlp", "zero_offload": "mlp"}


@dataclass(frozen=True)
class Degrees:
    """Parallel degrees and the microbatch of a run."""

    world: int
    tensor: int
    pipeline: int
    virtual: int
    sequence: int
    experts: int
    expert_tensor: int
    micro_batch: int

    @property
    def stage_ranks(self) -> int:
        return self.world // self.pipeline


def family(row: Row) -> str:
    """fsdp: state gathered and freed (ZeRO-2/3 of FSDP); zero_offload: with the optimizer on the host; else
    megatron."""
    sharded = row.get("sharding") in ("zero2", "zero3")
    if sharded and row.get("optimizer_offload", "") not in (*UNKNOWN, "0"):
        return "zero_offload"
    return "fsdp" if sharded else "megatron"


def stack(row: Row, facts: Conventions) -> Stack:
    """The software of a run, from what is known of its source and release."""
    kind = family(row)

    def built(word: Unfused) -> Built:
        return "composed" if word in facts.unfused else "fused"

    chunked = row.get("loss", "") in ("chunked", "fused") or _liger_loss(row)
    fused = facts.fused_loss and not chunked
    copies = "copies" in facts.unfused
    return Stack(
        name=row["source"],
        version=row.get("source_ref", "") or "unknown",
        kernels=Kernels(
            norm=built("norms"),
            rotary=built("rotary"),
            activation=built("activation"),
            residual=built("residual"),
            expert_rows=built("experts"),
            expert_products="looped" if kind == "megatron" and not recipes.whole_step(row) else "grouped",
            weight_grads=built("accumulation"),
            ring_blocks=built("blocks"),
            loss=("upcast" if row["source"] in UPCAST else "fused") if fused else "composed",
            dispatch_map=recipes.hybrid(row),
            attention={DEFAULT: facts.attention},
            deterministic=facts.deterministic,
            fills="fills" in facts.unfused,
        ),
        sharding=Sharding(fsdp=kind == "fsdp", copies=copies, experts=not facts.plain_experts),
        recompute=Recompute(stops_early=copies),
        host=Host(modules="modules" in facts.unfused, graphs=recipes.graphs(row)),
    )


def strategy(row: Row, degrees: Degrees, model: ModelSpec, facts: Conventions) -> Strategy:
    """The Strategy of a run. Raises SpecError naming a value that no Strategy has."""
    kind = family(row)
    zero = _lookup(ZERO, row, "sharding")
    reshard = zero == 3
    if kind == "fsdp":  # shards parameters in any case, and keeps them gathered under ZeRO-2
        zero = 3
    shard = degrees.stage_ranks // degrees.tensor if zero else 1
    spread = degrees.experts * degrees.expert_tensor
    plain = facts.plain_experts and degrees.experts > 1
    return Strategy(
        name=kind,
        world_size=degrees.world,
        micro_batch=degrees.micro_batch,
        stack=row["source"],
        pipeline=_pipeline(row, degrees),
        dense=Dense(
            tensor=degrees.tensor,
            sequence_parallel=facts.sequence_parallel or degrees.tensor == 1,
            shard=max(1, shard),
            zero=zero,
            reshard_after_forward=reshard,
            prefetch=1 if zero == 3 else 0,
            chunk_tokens=_TILE if "tiled mlp" in row.get("notes", "").lower() else 0,
            param_tier="host" if "parameter offload cpu" in row.get("notes", "").lower() else "device",
            grad_tier="host" if kind == "zero_offload" else "device",
        ),
        attention=Attention(sequence=degrees.sequence, exchange=_exchange(row, kind)),
        experts=Experts(
            degree=degrees.experts,
            tensor=degrees.expert_tensor,
            shard=max(1, degrees.stage_ranks // spread) if zero and not plain else 1,
            dispatch="deduplicated" if recipes.deduplicates(row) else "all_to_all",
        ),
        vocabulary=_vocabulary(row, degrees, model),
        optimizer=_optimizer(row, kind),
        activations=_activations(row, kind, facts.kept if degrees.tensor == 1 else (), model),
        overlap=_overlap(row, facts),
        precision=Precision(
            compute=facts.compute,
            param=facts.param,
            reduce=facts.reduce,
            grad=facts.grad,
            moments=facts.moments,
            master="param" if facts.master_is_param else "float32",
            matmul=_lookup(MATMUL, row, "precision"),
            attention="matmul" if recipes.eight_bit_attention(row) else "compute",
            vocabulary="matmul" if recipes.eight_bit_vocabulary(row) else "compute",
        ),
    )


T = TypeVar("T")

_TILE = 8192
"""Tokens of a tile of a tiled MLP or a fused loss, where the source does not say: memory no longer depends
on it."""


def _lookup(known: dict[str, T], row: Row, column: str) -> T:
    value = row.get(column, "")
    if value not in known:
        raise SpecError(column, value, f"is not one of {', '.join(known)}")
    return known[value]


def _pipeline(row: Row, degrees: Degrees) -> Pipeline:
    schedule: Literal["1f1b", "interleaved"] = "interleaved" if degrees.virtual > 1 else "1f1b"
    layers = recipes.layers(row, degrees.pipeline * degrees.virtual)
    return Pipeline(degree=degrees.pipeline, virtual_stages=degrees.virtual, schedule=schedule, layers=layers)


def _exchange(row: Row, kind: str) -> Literal["ulysses", "ring", "all_gather"]:
    """Megatron's context parallelism is a ring (or Ulysses, its a2a), torch's gathers keys and values,
    DeepSpeed's is Ulysses."""
    notes = row.get("notes", "").lower()
    if row.get("cp") == "1" or kind == "zero_offload" or "ulysses" in notes or "cp a2a" in notes:
        return "ulysses"
    return "all_gather" if kind == "fsdp" else "ring"


def _vocabulary(row: Row, degrees: Degrees, model: ModelSpec) -> Vocabulary:
    kind = row.get("loss", "")
    if degrees.tensor > 1 and kind in (*UNKNOWN, "vocab_parallel"):
        return Vocabulary(degree=degrees.tensor, loss="vocab_parallel")
    if _liger_loss(row):
        return Vocabulary(loss="chunked", chunk_tokens=_liger(row, degrees, model))
    if kind in ("chunked", "fused"):
        return Vocabulary(loss="chunked", chunk_tokens=_TILE)
    return Vocabulary(loss="full")


def _liger_loss(row: Row) -> bool:
    """Whether Liger's fused linear cross entropy makes the loss: where it says so, and by default of TRL."""
    kind = row.get("loss", "")
    stock = kind in UNKNOWN and "stock trl" in row.get("notes", "").lower()
    return row["source"] == "halo-bench" and (kind == "fused" or stock)


def _liger(row: Row, degrees: Degrees, model: ModelSpec) -> int:
    """Rows of a chunk of Liger's fused linear cross entropy, whose logits take as much memory as its input
    (linkedin/Liger-Kernel, ops/fused_linear_cross_entropy.py): the next power of two."""
    rows = degrees.micro_batch * (count(row, "seq_len") or 1) // degrees.sequence
    chunk = ceil_div(rows, ceil_div(model.vocab_size, model.hidden_size))
    return int(2 ** (chunk - 1).bit_length())


def _optimizer(row: Row, kind: str) -> Optimizer:
    fraction = number(row, "optimizer_offload") or 0.0
    if fraction == 0.0:
        return Optimizer()
    return Optimizer(state_tier="host", update_on="host", host_fraction=fraction)


def _activations(row: Row, kind: str, kept: tuple[str, ...], model: ModelSpec) -> Activations:
    """Raises SpecError for an unknown module. An offloaded fraction is of layers (cpu_offloading_num_layers)
    where no Strategy forbids it, else it is left out (see `approximations`)."""
    tier: Literal["device", "host"] = "host" if row.get("activation_offload") == "boundaries" else "device"
    recompute = recipes.recomputed(row, row["recompute"])
    if recompute == "none":
        away = round((_fraction(row) or 0.0) * model.num_hidden_layers)
        return Activations(recompute="none", boundary_tier=tier, layers_on_host=away)
    if kept:
        return Activations(recompute="full", kept=kept, boundary_tier=tier)
    if recompute == "full":
        return Activations(recompute="full", boundary_tier=tier)
    names = [SELECTIVE[kind] if name == "selective" else name for name in recompute.split("+")]
    known = ", ".join(MODULES)
    for name in names:
        if name not in MODULES:
            raise SpecError("recompute", name, f"is not one of none, full, selective, {known}")
    return Activations(recompute="selective", modules=tuple(dict.fromkeys(names)), boundary_tier=tier)


def _fraction(row: Row) -> float | None:
    """The fraction of the layers whose activations go to the host; None where it is not one, or where
    recomputation or a pipeline stands beside it."""
    if row.get("activation_offload", "") in (*UNKNOWN, "none", "boundaries") or row.get("pp") != "1":
        return None
    return number(row, "activation_offload") if recipes.recomputed(row, row["recompute"]) == "none" else None


def _overlap(row: Row, facts: Conventions) -> Overlap:
    """What the row names, and what the framework hides by default: absence from a list does not mean off,
    `none` does."""
    named = row.get("overlap", "")
    parts = () if named in UNKNOWN else named.split("+")
    hides = facts.overlaps and named != "none"
    chunks = row.get("pp") == "1" or row.get("vp", "") not in (*UNKNOWN, "1")
    return Overlap(
        grad_reduce="dp" in parts or hides,
        param_gather="dp" in parts or hides,
        pipeline="pp" in parts or hides,
        tensor="tp" in parts or hides,
        experts=recipes.hides_experts(row) and chunks,
    )


def approximations(row: Row) -> tuple[str, ...]:
    """What a row says that no Strategy does, and what is simulated instead."""
    found = []
    if row.get("activation_offload", "") not in (*UNKNOWN, "none", "boundaries") and _fraction(row) is None:
        found.append(
            "activations of a fraction of the layers on the host: time as if hidden, memory not scored"
        )
    if recipes.recomputed(row, row["recompute"]) != row["recompute"]:
        found.append("full recompute of a few layers: simulated as none")
    if row.get("routing") == "natural":
        words = recipes.distinct_tokens(row)
        spread = f"the loads of a text of {words} distinct tokens" if words else "a published spread of loads"
        found.append(f"natural routing: simulated with {spread}")
    if recipes.hides_experts(row) and not _overlap(row, conventions(row)).experts:
        found.append("expert exchanges hidden behind another microbatch: simulated in sequence")
    if (
        "selective" in row["recompute"]
        and family(row) == "fsdp"
        and not (conventions(row).kept and row["tp"] == "1")
    ):
        found.append("selective recompute of single ops: simulated as that of the FFN")
    return tuple(found)
