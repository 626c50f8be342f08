"""What a checkpoint belongs to, and whether a run may go on from it."""

from pathlib import Path
from typing import Any

import msgspec

from mopsim.common import io
from mopsim.common.changes import sparse
from mopsim.common.errors import MopError, SpecError, require_at_least
from mopsim.common.io import Spec
from mopsim.spec.config_reader import UNREAD
from mopsim.spec.model import DESCRIPTION, ModelSpec
from mopsim.spec.plan import Plan

_FORMAT = 3
"""Boxes of each parameter. 1: flat tensors of one runtime's own units; 2: intervals of its flat order."""
_READ = (2, _FORMAT)
_FIXED = ("seq_len", "global_batch", "routing", "document_tokens", "seed")
"""Of the plan's training, what a run cannot change (`check_state`), or what only a simulation reads."""


LATER = (
    "mlp_only_layers", "layer_types", "attention_chunk_size", "partial_rotary_factor", "ffn_activation",
    "norm_bias", "full_attention_rotary", "attn_temperature_tuning", "floor_scale", "attn_scale",
    "expert_inputs_weighted", "layers_without_ffn", "attention_output_gate", "linear_attention",
    "sparse_attention", "moe_latent_size",
)  # fmt: skip
"""Fields of ModelSpec that no digest of all of them had."""


class RunState(Spec, frozen=True, kw_only=True):
    """What a checkpoint belongs to. `step`: optimizer steps done, which is the data position too.

    model_digest: of the network (`_network_digest`); earlier_digests: as earlier versions made it.
    world_size: of the ranks that wrote it. tokenizer_digest: of what encoded the text (`data.tokenizer`), ""
    where nothing did or it is not known. files: SHA-256 (hex) of each file beside run.json. rules: what else
    its last step was made with, which may change: fields of the plan's training and options; {} = not
    known.
    """

    step: int
    format: int = 1
    files: dict[str, str] = msgspec.field(default_factory=dict)
    model: str
    model_digest: str
    earlier_digests: tuple[str, ...] = ()
    world_size: int
    vocab_size: int
    seq_len: int
    global_batch: int
    seed: int
    text_digest: str
    tokenizer_digest: str = ""
    rules: dict[str, Any] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        require_at_least(self, 1, "format", "world_size", "vocab_size", "seq_len", "global_batch")


def run_state(
    plan: Plan, step: int, seed: int, text_digest: str, tokenizer_digest: str = "", **options: str | int
) -> RunState:
    """The state of a run of `plan` after `step` steps. options: of the command, among its rules."""
    model, training, rules = plan.model, plan.training, io.to_plain(plan.training)
    return RunState(
        step=step,
        model=model.name,
        model_digest=_network_digest(model),
        earlier_digests=_earlier_digests(model),
        format=_FORMAT,
        world_size=plan.strategy.world_size,
        vocab_size=model.vocab_size,
        seq_len=training.seq_len,
        global_batch=training.global_batch,
        seed=seed,
        text_digest=text_digest,
        tokenizer_digest=tokenizer_digest,
        rules={name: value for name, value in rules.items() if name not in _FIXED} | options,
    )


def _network_digest(model: ModelSpec) -> str:
    """Of what is trained: a note about a model, or where it is from, makes no other one of it. Of fields that
    differ from their defaults: one that ModelSpec gains changes none."""
    return io.digest({k: v for k, v in sparse(model).items() if k not in DESCRIPTION})


def _earlier_digests(model: ModelSpec) -> tuple[str, ...]:
    """Of all fields that there were, without notes; with the one on keys of a config that were not read; and
    from before there was one."""
    notes = [note for note in model.assumptions if not note.startswith(UNREAD)]
    there = {k: v for k, v in io.to_plain(model).items() if k not in LATER or k in sparse(model)}
    trained = {k: v for k, v in there.items() if k not in DESCRIPTION}
    return io.digest(trained), io.digest(there), io.digest({**there, "assumptions": notes})


def changed(found: RunState, wanted: RunState) -> str:
    """The rules that are others than those of the checkpoint's last step, new and old; '' where none is."""
    both = [name for name in wanted.rules if name in found.rules]
    pairs = {name: (wanted.rules[name], found.rules[name]) for name in both}
    return ", ".join(f"{name} {new!r} (was {old!r})" for name, (new, old) in pairs.items() if new != old)


def check_state(found: RunState, wanted: RunState, path: Path) -> None:
    """Refuse to go on with a checkpoint of another model, vocabulary, batch, seed or text. The strategy, the
    runtime and the number of ranks may be others.
    """
    check_format(found, path, "--resume")
    for field, label in (
        ("vocab_size", "plan.model.vocab_size"),
        ("model", "plan.model.name"),
        ("model_digest", "plan.model (digest)"),
        ("seq_len", "plan.training.seq_len"),
        ("global_batch", "plan.training.global_batch"),
        ("seed", "seed"),
        ("text_digest", "--data (digest)"),
    ):
        have, want = getattr(found, field), getattr(wanted, field)
        if field == "model_digest" and have in wanted.earlier_digests:
            continue
        if have != want and field == "text_digest":
            rule = "is another text, --tokenizer, --init-from, --text-field or --loss-mask than"
            raise SpecError(label, want, f"{rule} the {have!r} that checkpoint {path} was made with")
        if have != want:
            raise SpecError(label, want, f"is not the {have!r} that checkpoint {path} was made with")


def check_format(found: RunState, path: Path, option: str) -> None:
    """Refuse a checkpoint in another format than this version's. option: that asks for it."""
    if found.format not in _READ:
        version = "an earlier" if found.format < _FORMAT else "a later"
        rule = f"format {found.format}, where this one's is {_FORMAT}"
        raise MopError(f"{option}: checkpoint {path} was written by {version} version of mopexec ({rule})")
