"""A strategy in a line of text."""

from collections.abc import Sequence
from itertools import groupby

from mopsim.common.units import format_bytes
from mopsim.spec.categories import WAITS
from mopsim.spec.strategy import Strategy

PLAIN = {"mbs=1", "recompute=none", "loss=full"}
"""Words that every line has in their place, where nothing is chosen."""


def describe(strategy: Strategy, routed: bool = True) -> str:
    """A strategy in a line, in the field's abbreviations: what equals the plain case is left out. routed:
    whether the network has experts; without, nothing is said of them."""
    s = strategy
    fsdp = s.dense.fsdp if s.dense.zero == 3 else 1
    degrees = {
        "DP": s.data_groups, "TP": s.dense.tensor_parallel, "PP": s.pipeline.pipeline_parallel,
        "VP": s.pipeline.virtual_stages, "CP": s.attention.context_parallel, "EP": s.experts.expert_parallel,
        "ETP": s.experts.expert_tensor_parallel, "FSDP": fsdp,
    }  # fmt: skip
    parts = [f"{name}={value}" for name, value in degrees.items() if value > 1]
    if s.dense.zero < 3 and s.dense.fsdp > 1:
        parts.append(f"ZeRO-{s.dense.zero}={s.dense.fsdp}")
    usual = (1, s.expert_replicas) if s.experts.expert_parallel > 1 else (s.dense.fsdp,)
    if routed and s.experts.expert_fsdp not in usual:
        parts.append(f"expert-FSDP={s.experts.expert_fsdp}")
    if s.dense.tensor_parallel > 1 and not s.dense.sequence_parallel:
        parts.append("sequence-parallel=no")
    if s.attention.context_parallel > 1:
        parts.append(f"CP-by={s.attention.cp_comm_type}")
    if s.pipeline.layers:
        parts.append(f"layers={_runs(s.pipeline.layers)}")
    if s.pipeline.splits or s.pipeline.folded:
        parts.append(f"schedule={s.pipeline.schedule}")
    if s.experts.expert_parallel > 1 or s.experts.gathers:
        parts += _experts(s)
    parts += [_vocabulary(s), f"mbs={s.micro_batch}"]
    if routed and s.experts.chunk_tokens:
        parts.append(f"expert-chunk={s.experts.chunk_tokens}")
    if s.dense.chunk_tokens:
        parts.append(f"ffn-chunk={s.dense.chunk_tokens}")
    parts.append(f"recompute={'+'.join(s.activations.modules_again) or s.activations.recompute}")
    if s.activations.recompute_num_layers:
        parts.append(f"recompute-layers={s.activations.recompute_num_layers}")
    if s.activations.save_ops:
        parts.append(f"save={'+'.join(s.activations.save_ops)}")
    if away := _offloaded(s):
        parts.append(f"offload={','.join(away)}")
    if s.dense.zero == 3 and not s.dense.reshard_after_forward:
        parts.append("reshard=no")
    p = s.precision
    if p.num_layers_at_start_in_bf16 or p.num_layers_at_end_in_bf16:
        parts.append(f"bf16-layers={p.num_layers_at_start_in_bf16}/{p.num_layers_at_end_in_bf16}")
    if s.compile != "none":
        parts.append(f"compile={s.compile}")
    return f"{s.name} {' '.join(parts)}"


def choices(strategy: Strategy) -> int:
    """How many choices the line of a strategy names: each word that is not PLAIN, and each part of one
    (modules, layers of stages, what is offloaded)."""
    words = describe(strategy).removeprefix(strategy.name).split()
    return sum(1 + word.count("+") + word.count(",") for word in words if word not in PLAIN)


def waits_for(kind: str, s: Strategy) -> str:
    """What compute waits for, of those kinds of exchanges that the plan has. kind: of `SimResult.exposed`."""
    said = WAITS.get(kind, kind.replace("_", " "))
    if kind != "all_to_all":
        return said
    by_heads = s.attention.context_parallel > 1 and s.attention.cp_comm_type == "ulysses"
    has = {"experts": s.experts.expert_parallel > 1, "sequences": by_heads}
    named = " and ".join(what for what, there in has.items() if there)
    return f"{said} of {named}" if named else said


def _vocabulary(s: Strategy) -> str:
    """How the vocabulary and its loss are split: over ranks, and over rows."""
    rows = f"/{s.vocabulary.chunk_tokens}" if s.vocabulary.chunk_tokens else ""
    if s.vocabulary.loss in ("ring", "vocab_parallel") and s.vocabulary.vocab_parallel > 1:
        kind = s.vocabulary.loss.removeprefix("vocab_")
        return f"vocab-{kind}={s.vocabulary.vocab_parallel}{rows}"
    return f"loss={s.vocabulary.loss}{rows}"


def _runs(counts: Sequence[int]) -> str:
    """'1,30x2,0': how many parts in a row have so many layers."""
    runs = [(value, len(list(same))) for value, same in groupby(counts)]
    return ",".join(f"{times}x{value}" if times > 1 else str(value) for value, times in runs)


def _experts(s: Strategy) -> list[str]:
    """How rows reach experts on other ranks, where it is not the plain way."""
    found = [] if s.experts.token_dispatcher == "alltoall" else [f"dispatch={s.experts.token_dispatcher}"]
    found += ["experts-apart"] if s.experts.rank_placement == "strided" else []
    return found + (["overlap=experts"] if s.overlap.experts else [])


def _offloaded(s: Strategy) -> list[str]:
    """What is kept on the host."""
    found = []
    if s.activations.layer_inputs == "host":
        budget = s.activations.host_budget
        found.append("inputs" + (f"/{format_bytes(budget, 0).replace(' ', '')}" if budget else ""))
    if s.activations.cpu_offload_layers:
        found.append(f"{s.activations.cpu_offload_layers}-layers")
    if s.dense.param_tier == "host":
        found.append("params")
    if s.optimizer.state_tier == "host":
        part = "" if s.optimizer.host_fraction == 1 else f"-{s.optimizer.host_fraction:.0%}"
        how = "" if s.optimizer.update_on == "host" else "-streamed"
        found.append(f"optimizer{part}{how}{'' if s.optimizer.overlap == 'none' else '-beside'}")
    return found
