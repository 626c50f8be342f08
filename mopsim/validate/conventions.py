"""What a software stack does that the table's columns do not say: precisions of state, allocator readings.

Taken from the notes of the row first, then from the habits of the framework, each with its source. Nothing
here is
fitted: these are facts about programs.
"""

import re
from dataclasses import dataclass
from typing import Literal

from mopsim.spec.stack import AttentionKernel, Unfused
from mopsim.spec.strategy import DType
from mopsim.validate.tables import Row

Reading = Literal["allocated", "reserved", "device"]
"""What a peak is the peak of: live tensors, the caching allocator's blocks, or the whole device (NVML)."""


_FUSED_LOSS = ("mcore-moe-paper", "llm-foundry")
"""Recipes whose loss is one kernel: cross_entropy_loss_fusion, and MPT's loss_fn fused_crossentropy."""


@dataclass(frozen=True)
class Conventions:
    """grad: dtype in which gradients are kept and reduced; param: of resident shards; master_is_param: no
    copy.

    reading: what was read as peak memory. last_stage: it was read on the last pipeline stage only.
    graphs: the step is replayed from CUDA graphs, in whole or for parts of a layer. fused_loss: one cross-
    entropy kernel. overlaps: what a row without a word on overlap hides: tuned Megatron recipes hide what
    they can. sequence_parallel: ranks of a tensor group split the rows outside of its regions.
    dropout: that the program applies where its arguments say nothing. plain_experts: experts that are spread
    over ranks are not sharded over their replicas. kept: kernels that recomputing a layer leaves out.
    unfused: see Stack.unfused. deterministic: sums are taken in a fixed order.
    """

    compute: DType = "bfloat16"
    param: DType = "bfloat16"
    reduce: DType = "float32"
    grad: DType = "float32"
    moments: DType = "float32"
    master_is_param: bool = False
    reading: Reading = "allocated"
    last_stage: bool = False
    graphs: bool = False
    compiled: bool = False
    attention: AttentionKernel = "profile"
    fused_loss: bool = False
    overlaps: bool = False
    sequence_parallel: bool = True
    dropout: float = 0.0
    plain_experts: bool = False
    kept: tuple[str, ...] = ()
    unfused: tuple[Unfused, ...] = ()
    deterministic: bool = False


def conventions(row: Row) -> Conventions:
    """The conventions of one run."""
    notes, source = row.get("notes", "").lower(), row["source"]
    compute: DType = "float16" if row["precision"] == "fp16" else "bfloat16"
    grad = _gradients(source, notes, compute)
    shards_in_fp32 = row.get("sharding") in ("zero2", "zero3") and not source.startswith("megatron")
    param: DType = "float32" if shards_in_fp32 else compute
    moments: DType = "float32"
    master_is_param = shards_in_fp32
    if "6 b/param" in notes:  # bf16 weights updated with stochastic rounding, bf16 moments
        param, moments, grad, master_is_param = "bfloat16", "bfloat16", "bfloat16", True
    if "bf16 moments" in notes or "moments in bf16" in notes:
        moments = "bfloat16"
    if (
        "alst" in source
    ):  # DeepSpeed ZeRO-3: bf16 weights and gradients, fp32 master and moments with the optimizer
        param, grad, master_is_param = "bfloat16", "bfloat16", False
    compiled = "torch.compile" in notes or "+compile" in notes or " compile " in notes
    return Conventions(
        compute=compute, param=param, reduce=_reduced(source, notes, grad), grad=grad, moments=moments,
        master_is_param=master_is_param, reading=_reading(notes), last_stage="last pipeline stage" in notes,
        graphs="cuda graph" in notes and "cuda graphs: off" not in notes and "cuda graph unset" not in notes,
        compiled=compiled,
        attention=_attention(source, notes),
        fused_loss=_fused_loss(row, notes, compiled),
        overlaps=source.startswith("megatron-bridge") or source in ("mcore-moe-paper", "moe-folding-paper"),
        sequence_parallel="sequence parallel false" not in notes and source not in _WHOLE_ROWS,
        dropout=_dropout(source),
        unfused=_unfused(source, notes, compiled),
        deterministic=_FIXED_ORDER in notes,
        plain_experts="framework halo" in notes,
        kept=_kept(row, compiled),
    )  # fmt: skip


_FIXED_ORDER, _APART = "deterministic=true", "accumulation fusion off"

_WHOLE_ROWS = ("vtrain",)
"""Sources whose tensor groups all-reduce the whole feature map: VIA-Research/vTrain, src/predictor.py
(`_add_tp_communication`, twice a layer and pass) and src/model/gpt_modeling.py, how it describes its runs."""


def _gradients(source: str, notes: str, compute: DType) -> DType:
    """Megatron-LM accumulates in fp32 with bf16 (its argument check forces it) and in fp16 with fp16;
    Megatron-Bridge
    recipes set grad_reduce_in_fp32 to false, which makes the gradient buffer bf16. FSDP's shards are fp32.
    """
    if "fp32 grad" in notes:
        return "float32"
    if source.startswith("megatron-bridge") or source == "mcore-moe-paper":
        return "bfloat16"
    return "float16" if compute == "float16" else "float32"


def _reduced(source: str, notes: str, grad: DType) -> DType:
    """Composer's mixed precision: DEFAULT reduces in fp32, PURE in the compute dtype."""
    return "bfloat16" if "mode pure" in notes else grad


def _fused_loss(row: Row, notes: str, compiled: bool) -> bool:
    """Megatron-Bridge's recipes and MPT fuse the loss; Halo runs Liger's cross entropy on logits that it
    keeps (its docs, optimization/liger-kernels.md). torchtitan compiles the loss with the model: torch 2.8,
    of the runs from April 2025 on, keeps logits in their own dtype; those of 2024 read as if it ran eagerly.
    """
    if _recipe_fuses(row["source"]) or "fused" in notes or "framework halo" in notes:
        return True
    date = _DATE.search(row.get("source_ref", ""))
    return compiled and row["source"] == "torchtitan" and date is not None and date.group(0) >= "202504"


def _recipe_fuses(source: str) -> bool:
    """Sources whose recipes all fuse the loss."""
    return source.startswith("megatron-bridge") or source in _FUSED_LOSS


_DATE = re.compile(r"20[2-9]\d(0[1-9]|1[0-2])")
"""Year and month of a benchmark in the name of its page."""


def _kept(row: Row, compiled: bool) -> tuple[str, ...]:
    """torchtitan's _save_list: attention and every second matrix product of a layer, in the order wq, wk, wv,
    wo, w1, w3, w2. A graph compiler drops w2's output, which no backward reads. Halo's recomputation replays
    what DeepEP brought (its docs, parallelism/expert-parallelism.md, Gradient-checkpoint dispatch replay)."""
    if row["source"] != "torchtitan" or row["recompute"] != "selective":
        halo = row["source"] == "halo-bench" and row["recompute"] == "full"
        return ("dispatch", "combine") if halo and row.get("dispatcher") == "deepep" else ()
    return ("q_proj", "v_proj", "attention_core", "gate_proj", *(() if compiled else ("down_proj",)))


def _reading(notes: str) -> Reading:
    if "nvml" in notes:
        return "device"
    return "reserved" if "peak memory is the reserved maximum" in notes else "allocated"


def _dropout(source: str) -> float:
    """Megatron-LM's arguments default hidden_dropout and attention_dropout to 0.1, which the GPT tests leave
    so; arXiv 2205.05198 counts the masks; Megatron-Bridge's recipes and those of SimuMax set them to 0."""
    return 0.1 if source in ("megatron-ci-golden", "megatron-selene-2022", "vtrain") else 0.0


def _unfused(source: str, notes: str, compiled: bool) -> tuple[Unfused, ...]:
    """torchtitan without torch.compile runs torch's own ops: a composite RMSNorm, a rotation of complex fp32
    numbers; its context parallelism merges blocks eagerly in any case, and its FSDP2 copies, as Halo's does.
    Halo's pages: Liger's norms, rotation and dense activation, but experts by transformers'
    functions around grouped_mm. All but compiled ones are Python modules, as Megatron-Core's are too.
    Megatron-DeepSpeed's gradients are added by autograd, Megatron-LM's where it is told so; its deterministic
    mode is torch.use_deterministic_algorithms, which fills what torch.empty makes
    (torch.utils.deterministic.fill_uninitialized_memory, true by default).
    """
    if source == "torchtitan":
        eager = () if compiled else ("norms", "rotary", "activation", "residual", "modules")
        return ("blocks", "copies", *eager)
    if source == "halo-bench":
        return ("residual", "experts", "copies", "modules")
    apart: tuple[Unfused, ...] = ("accumulation",) if source == "vtrain" or _APART in notes else ()
    return (*apart, *(("fills",) if _FIXED_ORDER in notes else ()), *(() if compiled else ("modules",)))


def _attention(source: str, notes: str) -> AttentionKernel:
    """llm-foundry of 2023: attn_impl triton. torch's scaled_dot_product_attention and DeepSpeed's Hugging
    Face models: FlashAttention-2; the pages of halo: FlashAttention-4. Megatron of 2022: scores kept (no
    flash kernel before 2023). Transformer Engine: the profile's.
    """
    local = "attention-backend=unfused" in notes or "transformer-impl=local" in notes
    if local or source == "vtrain" or source == "megatron-selene-2022":
        return "scores"
    if source == "llm-foundry":
        return "triton"
    if source == "halo-bench":
        return "flash4"
    return "flash2" if source in ("torchtitan", "alst-recipes", "olmo-core") else "profile"
