"""What the sources do not state, over its plausible choices: attention, heads, tokens of a step."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from mopsim.context.contenders import Contender
from mopsim.context.sweep import ContextCase
from mopsim.spec.model import ModelSpec


@dataclass(frozen=True)
class Variant:
    """One assumption of the base case changed. `why`: where that choice is found. lengths: the only ones
    asked, as the reach is of the smallest step whatever the whole one is; empty: all. offloaded: FSDP2 with
    everything on the host is asked too, at the first of them."""

    name: str
    label: str
    change: Callable[[ContextCase], ContextCase]
    why: str = ""
    lengths: tuple[int, ...] = ()
    offloaded: bool = False


def _attention(**fields: object) -> Callable[[ContextCase], ContextCase]:
    def change(case: ContextCase) -> ContextCase:
        model: ModelSpec = msgspec.structs.replace(case.model, **fields)
        return replace(case, model=model)

    return change


def _heads(query: int, key_value: int) -> Callable[[ContextCase], ContextCase]:
    return _attention(num_attention_heads=query, num_key_value_heads=key_value)


def _step(tokens: int) -> Callable[[ContextCase], ContextCase]:
    return lambda case: replace(case, tokens_per_device=tokens)


def _same(case: ContextCase) -> ContextCase:
    return case


def _at_once(case: ContextCase) -> ContextCase:
    return replace(case, accumulate=False)


STEP = (128 * 1024, 1024 * 1024)

VARIANTS = (
    Variant("base", "as assumed: GQA, 64 heads of 112, 8 key-value heads", _same, "the preset"),
    Variant("mha", "MHA: 64 key-value heads", _heads(64, 64), "no sharing of keys and values"),
    Variant(
        "mla",
        "MLA: 128 heads, latent 512",
        _attention(
            attention="mla",
            num_attention_heads=128,
            num_key_value_heads=128,
            head_dim=192,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
        ),
        "DeepSeek-V3, of the same hidden size",
    ),
    Variant("heads_32", "GQA, 32 heads, 8 key-value heads", _heads(32, 8), "half the attention work"),
    Variant(
        "heads_56",
        "GQA, 56 heads of 128, 8 key-value heads",
        _attention(num_attention_heads=56, num_key_value_heads=8, head_dim=128),
        "heads x 128 = hidden size; at most 8 ranks share a sequence",
    ),
    Variant("heads_128", "GQA, 128 heads, 8 key-value heads", _heads(128, 8), "twice the attention work"),
    Variant(
        "step_8k", "8K tokens a device and step", _step(8192), "the published largest FSDP2 batch", STEP, True
    ),
    Variant("step_32k", "32K tokens a device and step", _step(32 * 1024), "a small step", STEP),
    Variant("step_1m", "1M tokens a device and step", _step(1024 * 1024), "a large pre-training step", STEP),
    Variant("at_once", "one microbatch a step, as large as is best", _at_once, "no accumulation"),
)

OFFLOADED = Contender(
    family="fsdp2", stack="fsdp2-any-context",
    name="fsdp2_offloaded", label="FSDP2, full logits, all on the host", offload=("host",),
    rules="CPU offload always, all logits at once",
)  # fmt: skip
"""Beside the published points only: what CPU offload costs where a step is one sequence."""
