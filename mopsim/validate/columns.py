"""The columns of the tables that `mopsim validate` reads, and what each means (docs/reference/runs.md)."""

from collections.abc import Mapping
from functools import partial
from typing import Literal, NamedTuple

from mopsim.spec.categories import MODULES


class Column(NamedTuple):
    """needed: the header must have it. Others may be left out, and a cell may be empty or `unknown`.

    values: what a cell may say; words: what it may join by +. Any text where there are neither. read:
    whether a prediction depends on it: then a name that is nearly this one is a mistake. kind: what every
    cell must be that is not empty or `unknown`, whatever the others say. least: of a count.
    """

    needed: bool
    meaning: str
    values: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    read: bool = True
    kind: Literal["", "count", "number", "documents"] = ""
    least: int = 1


ROOTS = ("strategy.", "model.", "stack.")
"""Heads of dotted fields of a case: also columns that a table may have, each overriding every rule."""
_NEED, _MAY = True, False


def _one(meaning: str, values: str, words: str = "", *, needed: bool = _MAY) -> Column:
    """A column whose cells say one of `values`, or some of `words`."""
    return Column(needed, meaning, tuple(values.split()), tuple(words.split()))


_count, _number = partial(Column, kind="count"), partial(Column, kind="number")
_count_or_0 = partial(Column, kind="count", least=0)


def _note(meaning: str) -> Column:
    """A column for people."""
    return Column(_MAY, meaning, read=False)


RUNS: dict[str, Column] = {
    "run_id": Column(_NEED, "A name that no other row has."),
    "source": Column(_NEED, "Where it was published, in short. Rows of one source are held out together."),
    "model": Column(_NEED, "A row of the models table, or a preset."),
    "num_layers": _count(_MAY, "Decoder layers of the run, where the network was cut; else the model's."),
    "gpu": Column(_NEED, "A hardware profile."),
    "num_gpus": _count(_NEED, "Devices in all."),
    "gpus_per_node": _count(
        _MAY,
        "Devices of the scale-up domain (72 of GB200), as the profile has it, or fewer: whole nodes, or part "
        "of one.",
    ),
    "nic_gbit_per_s": _number(
        _MAY, "Gbit/s that a device has of the network between nodes, where it is not what the profile has."
    ),
    "scale_up_gb_per_s": _number(
        _MAY,
        "GB/s, each way, of a device to those of its scale-up domain, where it is not what the profile has.",
    ),
    "precision": _one("Of the matrix products.", "bf16 fp16 fp8 mxfp8 nvfp4", needed=_NEED),
    "seq_len": _count(_NEED, "Tokens of a sequence."),
    "micro_batch": _count(_NEED, "Sequences of a microbatch of one data-parallel rank."),
    "global_batch": _count(
        _MAY, "Sequences of an optimizer step; needed where a step time is to be predicted."
    ),
    "tp": _count(_MAY, "Tensor-parallel ranks; needed."),
    "pp": _count(_MAY, "Pipeline-parallel ranks; needed."),
    "vp": Column(_MAY, "Virtual stages of a pipeline rank; needed with a pipeline."),
    "cp": _count(_MAY, "Context-parallel ranks; needed."),
    "ep": _count(_MAY, "Expert-parallel ranks; needed with experts, else 1."),
    "etp": _count(_MAY, "Expert-tensor-parallel ranks; needed with experts, else 1."),
    "dp": _count(_MAY, "Data-parallel ranks: num_gpus over pp, cp and tp (or etp). Another is refused."),
    "sharding": _one("Over the data-parallel ranks; needed.", "none zero1 zero2 zero3"),
    "recompute": _one(
        "selective: the modules of the stack; needed.", "none full", " ".join(("selective", *MODULES))
    ),
    "optimizer_offload": Column(_MAY, "Fraction of the optimizer's state on the host."),
    "activation_offload": Column(_MAY, "none, boundaries (inputs of layers), or a fraction of the layers."),
    "loss": _one("What is kept of the logits.", "full vocab_parallel chunked fused"),
    "dispatcher": _one("How tokens reach their experts.", "none alltoall allgather deepep hybridep"),
    "overlap": _one("Communication beside compute. A name that is absent is not off.", "none", "dp pp tp ep"),
    "routing": _one("Needed with experts.", "balanced natural dense"),
    "tokens_per_s_per_gpu": _note("Measured: tokens/s of all GPUs over their number. For readers."),
    "model_tflops_per_gpu": _note("Measured, by the source's own count of FLOP. For readers."),
    "step_time_s": _number(_MAY, "Measured: seconds of an optimizer step."),
    "peak_memory_gib": _number(_MAY, "Measured: the fullest device, as the program reads its memory."),
    "fits": _one("For rows that are about capacity. A run with a step time did fit.", "yes oom"),
    "peer_step_time_s": _note("Of another simulator: seconds of the step. For readers."),
    "peer_peak_memory_gib": _note("Of another simulator: its peak. For readers."),
    "peer": _note("Which simulator that is. For readers."),
    "stack": Column(
        _MAY, "The software that ran it: a stack's name. Else looked up by `source`, else generic."
    ),
    "graphs": Column(_MAY, "What CUDA graphs replay: step, or components joined by +. Else read in notes."),
    "sequence_parallel": _one("no: tensor-parallel ranks keep all rows outside of products.", "yes no"),
    "cp_exchange": _one("Of context parallelism. Else the family's.", "ulysses ring all_gather"),
    "filler_tokens": Column(_MAY, "Distinct tokens of a text that repeats them, with natural routing."),
    "document_tokens": Column(
        _MAY,
        "Where attention does not cross the documents of a packed sequence: tokens of the document that a "
        "token is in, on average over tokens; or MEAN/SPREAD of log-normal lengths of the data's (485/1).",
        kind="documents",
    ),
    "loads": Column(_MAY, "Measured parts of the routes of each expert, with natural routing; by spaces."),
    "strategy.*, stack.*, model.*": Column(
        _MAY, "Any field of these by its dotted name: wins over columns, notes and recipes."
    ),
    "quality": _one("How fully the source states the run. C does not calibrate.", "A B C"),
    "notes": _note("What has no column, in words."),
    "source_ref": _note("Where in the source."),
}

NEEDED = ("seq_len", "micro_batch", "num_gpus", "tp", "pp", "cp", "sharding", "recompute")
"""Fields without which a run is not determined; vp with a pipeline, ep, etp and routing with experts also."""

MODELS: dict[str, Column] = {
    "model": Column(_NEED, "The name that a runs table uses. No other row has it."),
    "num_layers": _count(_MAY, "Decoder layers; needed."),
    "num_dense_layers": _count_or_0(_MAY, "Leading layers with a dense FFN; needed with experts."),
    "hidden": _count(_MAY, "Width of the residual stream; needed."),
    "dense_ffn_hidden": _count_or_0(_MAY, "Columns of a dense FFN; needed without experts."),
    "num_heads": _count(_MAY, "Query heads; needed."),
    "num_kv_heads": _count(_MAY, "Key and value heads; needed."),
    "head_dim": _count_or_0(_MAY, "Width of a query or key head; needed."),
    "attention": _one(
        "mla: multi-head latent attention. Of the others num_kv_heads counts.", "mha mqa gqa mla"
    ),
    "q_lora_rank": _count_or_0(_MAY, "Rank of MLA's queries."),
    "kv_lora_rank": _count_or_0(_MAY, "Rank of MLA's keys and values."),
    "qk_nope_head_dim": _count_or_0(_MAY, "Part of MLA's heads without positions."),
    "qk_rope_head_dim": _count_or_0(_MAY, "Part of MLA's heads with positions."),
    "v_head_dim": _count_or_0(_MAY, "Width of MLA's value heads."),
    "num_experts": _count_or_0(_MAY, "Routed experts of a layer; 0 or empty for a dense network."),
    "top_k": _count_or_0(_MAY, "Experts that a token chooses; needed with experts."),
    "expert_ffn_hidden": _count_or_0(_MAY, "Columns of one expert; needed with experts."),
    "num_shared_experts": _note("For readers: shared_ffn_hidden says what they cost."),
    "shared_ffn_hidden": _count_or_0(_MAY, "Columns of all shared experts together."),
    "vocab_size": _count(_MAY, "Rows of the embedding; needed."),
    "tied_embeddings": _count_or_0(_MAY, "1 where the output projection is the embedding, else 0."),
    "mtp_layers": _count_or_0(_MAY, "MTP layers."),
    "sliding_window": _count_or_0(_MAY, "Tokens that a windowed layer attends to."),
    "total_params_b": _number(_MAY, "Published count, 1e9 parameters; checked against."),
    "active_params_b": _number(_MAY, "Published count of a token's parameters, 1e9; checked against."),
    "notes": _note("What has no column, in words."),
    "source": _note("Where the numbers are from."),
}

COMPONENTS: dict[str, Column] = {
    "component": Column(_NEED, "What was measured: expert_dispatch, gemm, attention_kernel, all_to_all, ..."),
    "system": Column(_MAY, "Whose implementation."),
    "gpu": Column(_NEED, "A hardware profile."),
    "num_gpus": Column(_MAY, "Devices in all."),
    "params": Column(_NEED, "Its sizes, as JSON."),
    "metric": Column(_NEED, "latency_s, flops_per_s, peak_memory_gib, ..."),
    "value": Column(_NEED, "Measured, SI units (GiB for memory)."),
    "outcome": _one("Whether it ran.", "ok oom"),
    "notes": _note("What has no column, in words."),
    "source_ref": _note("Where in the source."),
}


NAMES = frozenset((*RUNS, *MODELS, *COMPONENTS))
"""Columns of any of the tables."""


def needed(columns: Mapping[str, Column]) -> tuple[str, ...]:
    """The columns without which a table is refused."""
    return tuple(name for name, column in columns.items() if column.needed)
