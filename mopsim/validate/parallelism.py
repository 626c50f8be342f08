"""The columns of a run -> a Strategy. What a program does anyway is its stack's, and nothing here asks which
program it is."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from mopsim.common.changes import changed
from mopsim.common.errors import MopError, SpecError, require
from mopsim.common.explain import not_one_of
from mopsim.common.rules import RowFacts
from mopsim.spec.capability import Job, values_had
from mopsim.spec.categories import MODULES
from mopsim.spec.layout import ceil_div, full_parts
from mopsim.spec.model import ModelSpec
from mopsim.spec.stack import Stack
from mopsim.spec.strategy import (
    Activations,
    Attention,
    Dense,
    Dispatcher,
    DType,
    Exchange,
    Experts,
    MatmulDType,
    Optimizer,
    Overlap,
    Pipeline,
    Precision,
    Strategy,
    Vocabulary,
)  # fmt: skip
from mopsim.validate.facts import FamilyHabits, families, loss_parts
from mopsim.validate.tables import UNKNOWN, Row, UnsupportedError, count, number

ZERO: dict[str, Literal[0, 1, 2, 3]] = {"none": 0, "zero1": 1, "zero2": 2, "zero3": 3}
MATMUL: dict[str, MatmulDType | Literal["compute"]] = {
    "bf16": "compute", "fp16": "compute", "fp8": "fp8", "mxfp8": "mxfp8", "nvfp4": "nvfp4",
}  # fmt: skip
DISPATCHERS: dict[str, Dispatcher] = {"allgather": "allgather", "deepep": "deepep", "hybridep": "hybridep"}
"""Dispatchers other than the plain one."""
LOSSES = ("full", "vocab_parallel", "chunked")
"""What the column `loss` says of a strategy's."""
TILE = 8192
"""Tokens of a tile of a chunked loss, where the source does not say: memory no longer depends on it."""
SOME = re.compile(
    r"\bblock\b[^;]{0,40}?\b(\d+) (?:of \d+ )?layers"
    r"|\bblock\b.*?recompute[_-]num[_-]layers[ =:]*(\d+)|recompute[_-]num[_-]layers[ =:]*(\d+).*?\bblock\b"
)
"""Notes of Megatron's recompute_method block with recompute_num_layers."""
T = TypeVar("T")


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


def family_of(row: Row) -> str:
    """fsdp: state gathered and freed (ZeRO-2/3); zero_offload: with the optimizer on the host; else
    megatron."""
    sharded = row.get("sharding") in ("zero2", "zero3")
    if sharded and number(row, "optimizer_offload"):
        return "zero_offload"
    return "fsdp" if sharded else "megatron"


def strategy(
    known: RowFacts, degrees: Degrees, model: ModelSpec, stack: Stack
) -> tuple[Strategy, tuple[str, ...]]:
    """The Strategy of a run, and what it does that no Strategy says. Raises SpecError naming a value."""
    row, kind = known.row, family_of(known.row)
    family = families()[kind]
    zero = _lookup(ZERO, row, "sharding")
    reshard = zero == 3
    if family.gathers and stack.sharding.fsdp:
        zero = 3
    plain = not stack.sharding.experts and degrees.experts > 1
    spread = degrees.experts * degrees.expert_tensor
    pipeline = Pipeline(
        pipeline_parallel=degrees.pipeline,
        virtual_stages=degrees.virtual,
        schedule="interleaved" if degrees.virtual > 1 else "1f1b",
        layers=edges_counted(model.num_hidden_layers, degrees.pipeline * degrees.virtual),
    )
    chunk = pipeline.largest_chunk(model.num_hidden_layers)
    activations, approximations = _activations(row, model, stack, chunk)
    found = Strategy(
        name=kind,
        world_size=degrees.world,
        micro_batch=degrees.micro_batch,
        stack=stack.name,
        pipeline=pipeline,
        dense=Dense(
            tensor_parallel=degrees.tensor,
            sequence_parallel=degrees.tensor == 1 or row.get("sequence_parallel") != "no",
            fsdp=max(1, degrees.stage_ranks // degrees.tensor) if zero else 1,
            zero=zero,
            reshard_after_forward=reshard,
            prefetch=1 if zero == 3 else 0,
            grad_tier=family.grad_tier,
        ),
        attention=Attention(context_parallel=degrees.sequence, cp_comm_type=_exchange(row, family, stack)),
        experts=Experts(
            expert_parallel=degrees.experts,
            expert_tensor_parallel=degrees.expert_tensor,
            expert_fsdp=max(1, degrees.stage_ranks // spread) if zero and not plain else 1,
            token_dispatcher=DISPATCHERS.get(row.get("dispatcher", ""), "alltoall"),
        ),
        vocabulary=_vocabulary(row, degrees, model, stack),
        optimizer=_optimizer(row),
        activations=activations,
        overlap=_overlap(row),
        precision=_precision(row),
    )
    return _settled(_exchanged(found, row, model, stack), known, stack, approximations)


def edges_counted(layers: int, parts: int) -> tuple[int, ...]:
    """Layers of each part of a pipeline whose embedding and loss count as a layer each, where only so all
    parts are alike (126 layers in 8, 64 or 128 parts). Else empty."""
    if parts < 3 or (layers + 2) % parts or layers % parts == 0:
        return ()
    return full_parts(layers, parts, 1, 1)


def _settled(
    found: Strategy, known: RowFacts, stack: Stack, approximations: tuple[str, ...]
) -> tuple[Strategy, tuple[str, ...]]:
    """With the settings of the row; without an overlap that its pipeline has no other microbatch for."""
    try:
        found = changed(found, known.of("strategy"), "strategy")
    except MopError as error:
        raise UnsupportedError(str(error).split(":")[0].removeprefix("strategy."), str(error)) from error
    if stack.resolve(found).activations.modules[:1] == ("mlp",) and known.row["recompute"] == "selective":
        approximations += ("selective recompute of single ops: simulated as that of the FFN",)
    if (
        not found.overlap.experts
        or found.pipeline.pipeline_parallel == 1
        or found.pipeline.virtual_stages > 1
    ):
        return found, approximations
    text = "expert exchanges hidden behind another microbatch: simulated in sequence"
    return changed(found, {"overlap.experts": False}, "strategy"), (*approximations, text)


def _lookup(known: Mapping[str, T], row: Row, column: str) -> T:
    value = row.get(column, "")
    if value not in known:
        raise SpecError(column, value, not_one_of(known))
    return known[value]


def _exchange(row: Row, family: FamilyHabits, stack: Stack) -> Exchange:
    """The row's, else the family's where the program has it, else the program's."""
    if row.get("cp") == "1":
        return "ulysses"
    if row.get("cp_exchange"):
        named: dict[str, Exchange] = {one: one for one in get_args(Exchange)}
        return _lookup(named, row, "cp_exchange")
    usual, had = family.context_exchange, stack.has.get("attention.cp_comm_type", ())
    return usual if usual in had or not had else had[0]


def _exchanged(found: Strategy, row: Row, model: ModelSpec, stack: Stack) -> Strategy:
    """With an exchange that the program has on this network, where the row does not say which."""
    works = values_had(Job(model, found, stack=stack), "attention.cp_comm_type")
    if row.get("cp_exchange") or not works or found.attention.cp_comm_type in works:
        return found
    return changed(found, {"attention.cp_comm_type": works[0]}, "strategy")


def _vocabulary(row: Row, degrees: Degrees, model: ModelSpec, stack: Stack) -> Vocabulary:
    """`fused` is a cross entropy fused with the projection where the program has one, else one that is a
    single kernel on whole logits, where that is its loss; `full` is whole rows, of which a rank that splits
    products has its slice in a program that says so, unless its own loss gathers them. Raises SpecError where
    it has neither."""
    kind = row.get("loss", "")
    if kind == "full" and "vocab_parallel" in stack.has.get("vocabulary.loss", ()):
        kind = kind if stack.kernels.loss == "gathered" else "unknown"
    had = stack.has.get("vocabulary.loss", LOSSES)
    if kind == "fused" and "chunked" not in had and stack.kernels.loss in ("fused", "native"):
        kind = "unknown"
    if kind not in UNKNOWN and ("chunked" if kind == "fused" else kind) not in had:
        works = ", ".join(one for one in LOSSES if one in had)
        rule = f"is not in the stack {stack.name}, which has {works}, and fused with a column"
        raise SpecError("loss", kind, f"{rule} stack.kernels.loss of fused (its own: {stack.kernels.loss})")
    if degrees.tensor > 1 and kind in (*UNKNOWN, "vocab_parallel"):
        return Vocabulary(vocab_parallel=degrees.tensor, loss="vocab_parallel")
    if kind == "fused":
        return Vocabulary(loss="chunked", chunk_tokens=_linear_cross_entropy(row, degrees, model))
    if kind != "chunked":
        return Vocabulary()
    parts = loss_parts(stack.kernels.loss_chunks)
    return Vocabulary(loss="chunked", chunk_tokens=ceil_div(_rows(row, degrees), parts) if parts else TILE)


def _rows(row: Row, degrees: Degrees) -> int:
    """Tokens of a microbatch on a rank."""
    return max(1, degrees.micro_batch * (count(row, "seq_len") or 1) // degrees.sequence)


def _linear_cross_entropy(row: Row, degrees: Degrees, model: ModelSpec) -> int:
    """Rows of a chunk of a fused linear cross entropy, whose logits take as much memory as its input
    (linkedin/Liger-Kernel, ops/fused_linear_cross_entropy.py): the next power of two."""
    chunk = ceil_div(_rows(row, degrees), ceil_div(model.vocab_size, model.hidden_size))
    return int(2 ** (chunk - 1).bit_length())


def _optimizer(row: Row) -> Optimizer:
    fraction = number(row, "optimizer_offload") or 0.0
    if fraction == 0.0:
        return Optimizer()
    return Optimizer(state_tier="host", update_on="host", host_fraction=fraction)


def _activations(row: Row, model: ModelSpec, stack: Stack, chunk: int) -> tuple[Activations, tuple[str, ...]]:
    """Raises SpecError for an unknown module. An offloaded fraction is of layers
    (cpu_offloading_num_layers) where neither recomputation nor a pipeline stands beside it, else it is left
    out. chunk: layers of the model chunk that has most: so many recomputed ones, or more, are all."""
    tier: Literal["device", "host"] = "host" if row.get("activation_offload") == "boundaries" else "device"
    recompute, told = row["recompute"], []
    some = _some(row)
    if recompute == "full" and some == 0:
        recompute = "none"
    away = 0.0
    if row.get("activation_offload", "") not in (*UNKNOWN, "none", "boundaries"):
        away = number(row, "activation_offload") or 0.0
        rule = "is not none, nor boundaries, nor a fraction of the layers from 0 to 1"
        require(away <= 1, "activation_offload", row["activation_offload"], rule)
        if row.get("pp") != "1" or recompute != "none":
            away = 0.0
            told.append(
                "activations of a fraction of the layers on the host: time as if hidden, memory not scored"
            )
    if recompute == "none":
        layers = round(away * model.num_hidden_layers)
        return Activations(recompute="none", layer_inputs=tier, cpu_offload_layers=layers), tuple(told)
    if recompute == "full":
        part = some if some and some < chunk else 0
        return Activations(layer_inputs=tier, recompute_num_layers=part), tuple(told)
    own = bool(stack.recompute.selective or stack.recompute.kept)
    if recompute == "selective" and own:
        return Activations(recompute="selective", layer_inputs=tier), tuple(told)
    usual = stack.recompute.selective
    if "selective" in recompute.split("+") and not usual:
        rule = f"does not say of which modules, nor does the stack {stack.name} (recompute.selective)"
        raise SpecError("recompute", recompute, rule)
    names = [name for each in recompute.split("+") for name in (usual if each == "selective" else (each,))]
    for name in names:
        if name not in MODULES:
            raise SpecError("recompute", name, f"is not one of none, full, selective, {', '.join(MODULES)}")
    modules = tuple(dict.fromkeys(names))
    return Activations(recompute="selective", modules=modules, layer_inputs=tier), tuple(told)


def _some(row: Row) -> int | None:
    """Layers of each model chunk that are recomputed, where notes say so (SOME)."""
    found = SOME.search(row.get("notes", "").lower())
    return int(next(filter(None, found.groups()))) if found else None


def _overlap(row: Row) -> Overlap:
    """What the row names; the rest is the stack's habit: absence from a list does not mean off, `none`
    does."""
    named = row.get("overlap", "")
    if named == "none":
        return Overlap()
    parts = () if named in UNKNOWN else named.split("+")
    dp, pp, tp, ep = (True if part in parts else None for part in ("dp", "pp", "tp", "ep"))
    return Overlap(grad_reduce=dp, param_gather=dp, pipeline=pp, tensor=tp, experts=ep)


def _precision(row: Row) -> Precision:
    """The recipe's; dtypes of state are the stack's."""
    compute: DType = "float16" if row["precision"] == "fp16" else "bfloat16"
    return Precision(
        compute=compute, param="stack", reduce="stack", grad="stack", moments="stack", master="stack",
        matmul=_lookup(MATMUL, row, "precision"),
    )  # fmt: skip
