"""The columns of the tables that `mopsim validate` reads, and what each means (docs/reference/runs.md)."""

from typing import NamedTuple


class Column(NamedTuple):
    """needed: the header must have it. Others may be left out, and a cell may be empty or `unknown`."""

    needed: bool
    meaning: str


_NEED, _MAY = True, False

RUNS: dict[str, Column] = {
    "run_id": Column(_NEED, "A name that no other row has."),
    "source": Column(_NEED, "Where it was published, in short. Rows of one source are held out together."),
    "model": Column(_NEED, "A row of the models table, or a preset."),
    "num_layers": Column(_MAY, "Decoder layers of the run, where the network was cut; else the model's."),
    "gpu": Column(_NEED, "A hardware profile."),
    "num_gpus": Column(_NEED, "Devices in all."),
    "gpus_per_node": Column(_MAY, "For readers: the profile says it."),
    "precision": Column(_NEED, "Of the matrix products: bf16, fp16, fp8, mxfp8, nvfp4."),
    "seq_len": Column(_NEED, "Tokens of a sequence."),
    "micro_batch": Column(_NEED, "Sequences of a microbatch of one data-parallel rank."),
    "global_batch": Column(
        _MAY, "Sequences of an optimizer step; needed where a step time is to be predicted."
    ),
    "tp": Column(_MAY, "Tensor-parallel ranks; needed."),
    "pp": Column(_MAY, "Pipeline-parallel ranks; needed."),
    "vp": Column(_MAY, "Virtual stages of a pipeline rank; needed with a pipeline."),
    "cp": Column(_MAY, "Context-parallel ranks; needed."),
    "ep": Column(_MAY, "Expert-parallel ranks; needed with experts."),
    "etp": Column(_MAY, "Expert-tensor-parallel ranks; needed with experts."),
    "dp": Column(_MAY, "For readers: it follows from the other degrees."),
    "sharding": Column(_MAY, "none, zero1, zero2 or zero3 over the data-parallel ranks; needed."),
    "recompute": Column(_MAY, "none, full, selective, or modules joined by +; needed."),
    "optimizer_offload": Column(_MAY, "Fraction of the optimizer's state on the host."),
    "activation_offload": Column(_MAY, "none, boundaries (inputs of layers), or a fraction of the layers."),
    "loss": Column(_MAY, "full, vocab_parallel, chunked or fused."),
    "dispatcher": Column(_MAY, "alltoall, allgather, deepep, hybridep, or none."),
    "overlap": Column(_MAY, "Communication beside compute, joined by +. A name that is absent is not off."),
    "routing": Column(_MAY, "balanced, natural or dense; needed with experts."),
    "tokens_per_s_per_gpu": Column(_MAY, "Measured: tokens/s of all GPUs over their number. For readers."),
    "model_tflops_per_gpu": Column(_MAY, "Measured, by the source's own count of FLOP. For readers."),
    "step_time_s": Column(_MAY, "Measured: seconds of an optimizer step."),
    "peak_memory_gib": Column(_MAY, "Measured: the fullest device, as the program reads its memory."),
    "fits": Column(_MAY, "yes or oom, for rows that are about capacity."),
    "stack": Column(
        _MAY, "The software that ran it: a stack's name. Else looked up by `source`, else generic."
    ),
    "graphs": Column(_MAY, "What CUDA graphs replay: step, or components joined by +. Else read in notes."),
    "sequence_parallel": Column(_MAY, "`no` where tensor-parallel ranks keep all rows outside of products."),
    "cp_exchange": Column(_MAY, "Context parallelism by ulysses, ring or all_gather. Else the family's."),
    "filler_tokens": Column(_MAY, "Distinct tokens of a text that repeats them, with natural routing."),
    "strategy.*, stack.*, model.*": Column(
        _MAY, "Any field of these by its dotted name: wins over columns, notes and recipes."
    ),
    "quality": Column(_MAY, "A, B or C: how fully the source states the run. C does not calibrate."),
    "notes": Column(_MAY, "What has no column, in words."),
    "source_ref": Column(_MAY, "Where in the source."),
}

MODELS: dict[str, Column] = {
    "model": Column(_NEED, "The name that a runs table uses. No other row has it."),
    "num_layers": Column(_MAY, "Decoder layers; needed."),
    "num_dense_layers": Column(_MAY, "Leading layers with a dense FFN; needed with experts."),
    "hidden": Column(_MAY, "Width of the residual stream; needed."),
    "dense_ffn_hidden": Column(_MAY, "Columns of a dense FFN; needed without experts."),
    "num_heads": Column(_MAY, "Query heads; needed."),
    "num_kv_heads": Column(_MAY, "Key and value heads; needed."),
    "head_dim": Column(_MAY, "Width of a query or key head; needed."),
    "attention": Column(_MAY, "`mla` for multi-head latent attention; else grouped-query."),
    "q_lora_rank": Column(_MAY, "Rank of MLA's queries."),
    "kv_lora_rank": Column(_MAY, "Rank of MLA's keys and values."),
    "qk_nope_head_dim": Column(_MAY, "Part of MLA's heads without positions."),
    "qk_rope_head_dim": Column(_MAY, "Part of MLA's heads with positions."),
    "v_head_dim": Column(_MAY, "Width of MLA's value heads."),
    "num_experts": Column(_MAY, "Routed experts of a layer; 0 or empty for a dense network."),
    "top_k": Column(_MAY, "Experts that a token chooses; needed with experts."),
    "expert_ffn_hidden": Column(_MAY, "Columns of one expert; needed with experts."),
    "num_shared_experts": Column(_MAY, "For readers: shared_ffn_hidden says what they cost."),
    "shared_ffn_hidden": Column(_MAY, "Columns of all shared experts together."),
    "vocab_size": Column(_MAY, "Rows of the embedding; needed."),
    "tied_embeddings": Column(_MAY, "1 where the output projection is the embedding."),
    "mtp_layers": Column(_MAY, "MTP layers."),
    "sliding_window": Column(_MAY, "Tokens that a windowed layer attends to."),
    "total_params_b": Column(_MAY, "Published count, 1e9 parameters; checked against."),
    "active_params_b": Column(_MAY, "Published count of a token's parameters, 1e9; checked against."),
    "notes": Column(_MAY, "What has no column, in words."),
    "source": Column(_MAY, "Where the numbers are from."),
}

COMPONENTS: dict[str, Column] = {
    "component": Column(_NEED, "What was measured: expert_dispatch, gemm, attention_kernel, all_to_all, ..."),
    "system": Column(_MAY, "Whose implementation."),
    "gpu": Column(_NEED, "A hardware profile."),
    "num_gpus": Column(_MAY, "Devices in all."),
    "params": Column(_NEED, "Its sizes, as JSON."),
    "metric": Column(_NEED, "latency_s, flops_per_s, peak_memory_gib, ..."),
    "value": Column(_NEED, "Measured, SI units (GiB for memory)."),
    "outcome": Column(_MAY, "ok or oom."),
    "notes": Column(_MAY, "What has no column, in words."),
    "source_ref": Column(_MAY, "Where in the source."),
}


def needed(columns: dict[str, Column]) -> tuple[str, ...]:
    """The columns without which a table is refused."""
    return tuple(name for name, column in columns.items() if column.needed)
