"""What recipes set that the table's columns do not say, by network, machine and release: facts about
programs, with where they are written. Nothing here is fitted.

Megatron-Bridge (github.com/NVIDIA-NeMo/Megatron-Bridge): scripts/performance/configs of v0.3.0 to v0.5.0,
src/megatron/bridge/perf_recipes of v0.6.0. NeMo 26.06 is v0.5.0, 26.08 is v0.6.0.
"""

import re

from mopsim.validate.tables import Row, count

DEEPSEEK_LAYERS = {8: (*[8] * 7, 5), 16: (*[4] * 15, 1), 32: (1, *[2] * 30, 0)}
"""Decoder layers of each part by the number of parts: the layouts of Megatron-Bridge's DeepSeek-V3 recipes,
`Et*4|(t*4|)*14tmL` and the like, where MTP layer and loss take the place of three (arXiv 2603.07685 too)."""

WHOLE = ("deepseek_v3", "qwen3_30b_a3b"), ("gb200-186g", "gb300-288g")
"""Networks and machines whose MXFP8 recipes of v0.6.0 replay the whole step and hide the experts' exchanges,
which the pages of that release and the model cards of its time leave out."""

GRAPHED = {"attn": "attention", "moe_router": "router", "mlp": "dense_ffn"}
"""Scopes of Transformer Engine's graphs -> components."""


def layers(row: Row, parts: int) -> tuple[int, ...]:
    """Decoder layers of each part of the pipeline; empty = as even as can be."""
    whole = row["model"].startswith("deepseek_v3") and count(row, "num_layers") in (None, 61)
    return DEEPSEEK_LAYERS.get(parts, ()) if whole else ()


def whole_step(row: Row) -> bool:
    """Whether one CUDA graph holds the whole step."""
    notes = row.get("notes", "").lower()
    return "full_iteration" in notes or _late(row, notes)


def graphs(row: Row) -> tuple[str, ...]:
    """Components that CUDA graphs replay, or `step`."""
    if whole_step(row):
        return ("step",)
    found = re.search(r"cuda graphs?:? ([^;]*)", row.get("notes", "").lower())
    words = re.findall(r"[a-z_]+", found.group(1)) if found else []
    return tuple(dict.fromkeys(GRAPHED[word] for word in words if word in GRAPHED))


def deduplicates(row: Row) -> bool:
    """Whether a token goes once to a rank (DeepEP, HybridEP): as said, or as in the recipes of v0.6.0."""
    return row.get("dispatcher") in ("deepep", "hybridep") or _late(row, row.get("notes", "").lower())


def distinct_tokens(row: Row) -> int:
    """Distinct tokens that a filler text is made of, in equal parts; 0: a text, or not known.

    Halo's benchmarks, and those of stock TRL beside it, write one word seq_len / 2 times and pad the rest
    (whitecircle/halo, tests/common/datasets.py: create_benchmark_dataset).
    """
    return 2 if row["source"] == "halo-bench" else 0


HOPPER_SMS, BLACKWELL_SMS = 132, 148
"""SMs of H100 SXM (NVIDIA's H100 architecture paper) and of B200, taken for all Blackwell parts."""
HYBRID_SMS = 32
"""SMs of HybridEP's kernels in Megatron-Bridge's performance recipes (perf_recipes/_common.py and
scripts/performance/utils/overrides.py: moe_hybridep_num_sms)."""


def hybrid(row: Row) -> bool:
    """Whether HybridEP exchanges the rows of experts; the other kernels of `deduplicates` are DeepEP's."""
    named = row.get("dispatcher")
    return named == "hybridep" or (named != "deepep" and _bridge(row) and deduplicates(row))


def _bridge(row: Row) -> bool:
    return row["source"].startswith("megatron-bridge")


def communication_share(row: Row, share: float) -> float:
    """Part of the SMs that the exchanges of the experts take from what runs beside them, where it is not the
    profile's `share`."""
    if not (hybrid(row) and _bridge(row)):
        return share
    return HYBRID_SMS / (HOPPER_SMS if row["gpu"].startswith("h") else BLACKWELL_SMS)


def hides_experts(row: Row) -> bool:
    """Whether the exchanges of the experts hide behind another microbatch: as said, or as in the recipes of
    v0.6.0, that of Qwen3-30B-A3B in bf16 on H100 among them."""
    notes = row.get("notes", "").lower()
    hopper = "perf recipe" in notes and "qwen3_30b_a3b_pretrain_16gpu_h100_bf16_config" in notes
    return "ep" in row.get("overlap", "").split("+") or hopper or _late(row, notes)


def recomputed(row: Row, recompute: str) -> str:
    """`full` of a few layers only is nearer to none: the note `full(block,5 layers)` of a network of 32."""
    found = re.search(r"full\(block,(\d+) layers\)", row.get("notes", "").lower())
    layers, stages = count(row, "num_layers"), count(row, "pp") or 1
    few = found and layers and int(found.group(1)) * stages < layers / 2
    return "none" if few and recompute == "full" else recompute


def eight_bit_attention(row: Row) -> bool:
    """Recipes with fp8_dot_product_attention: those of MXFP8 that replay the whole step, but DeepSeek-V3's on
    GB200."""
    moe = row["model"].startswith(("deepseek_v3", "qwen3"))
    return (
        row["precision"] == "mxfp8"
        and moe
        and _bridge(row)
        and whole_step(row)
        and not (row["model"].startswith("deepseek_v3") and row["gpu"].startswith("gb200"))
    )


def eight_bit_vocabulary(row: Row) -> bool:
    """Recipes with fp8_output_proj: those of DeepSeek-V3 that replay the whole step."""
    mine = _bridge(row) and row["precision"] == "mxfp8"
    return mine and row["model"].startswith("deepseek_v3") and whole_step(row)


def _late(row: Row, notes: str) -> bool:
    """Rows of v0.6.0's time that do not say it."""
    models, machines = WHOLE
    mine = _bridge(row) and row["precision"] == "mxfp8"
    then = "nemo 26.08" in notes or "perf recipe" in notes
    return mine and then and row["model"] in models and row["gpu"] in machines
