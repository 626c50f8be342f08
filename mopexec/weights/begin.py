"""Beginning a run from a Hugging Face directory: its network is the plan's, every tensor is accounted for."""

import shutil
from pathlib import Path
from typing import Any

import msgspec

from mopexec.run.plans import KEPT
from mopexec.weights.files import Weights, read_config
from mopexec.weights.layout import Layout, family_of
from mopsim.common.errors import MopError, SpecError
from mopsim.spec.huggingface import from_config
from mopsim.spec.model import DESCRIPTION, LayerKind, ModelSpec
from mopsim.spec.plan import Plan

_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "vocab.json",
    "merges.txt", "added_tokens.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def open_weights(folder: Path, plan: Plan) -> Weights:
    """The weights in `folder` for `plan`. Raises MopError naming file, tensor and rule, or the field in which
    the networks differ.
    """
    config = read_config(folder)
    theirs = from_config(config, str(folder / "config.json"))
    field = difference(theirs, plan.model)
    if field is not None:
        rule = f"is not the {getattr(theirs, field)!r} of --init-from {folder / 'config.json'}"
        raise SpecError(f"plan.model.{field}", getattr(plan.model, field), rule)
    check_rules(folder, plan)
    return Weights(folder, Layout(plan.model, architecture(config, folder), str(folder / "config.json")))


def check_rules(folder: Path, plan: Plan) -> None:
    """Refuse to train what weights like those of `folder` cannot hold. Raises MopError."""
    family, rate = family_of(architecture(read_config(folder), folder)), plan.training.bias_update_rate
    if plan.model.num_moe_layers and rate and not family.balance_bias:
        rule = (
            f"must be 0: weights of {family.architecture} have no place for a router's balance bias "
            "(--set bias_update_rate=0)"
        )
        raise SpecError("plan.training.bias_update_rate", rate, rule)


def architecture(config: dict[str, Any], folder: Path) -> str:
    """The architecture that config.json names. Raises MopError."""
    listed = config.get("architectures")
    if not isinstance(listed, list) or not listed or not isinstance(listed[0], str):
        raise MopError(f"{folder / 'config.json'}: architectures: must be a list with the network's name")
    return listed[0]


def difference(theirs: ModelSpec, ours: ModelSpec) -> str | None:
    """The first field in which two networks differ, None where they are the same one."""
    unused: tuple[str, ...] = () if ours.num_dense_layers else ("intermediate_size",)
    if _kinds(theirs) == _kinds(ours):
        unused += ("first_k_dense_replace", "mlp_only_layers", "sliding_window_period", "layer_types")
    for field in msgspec.structs.fields(ModelSpec):
        same = getattr(theirs, field.name) == getattr(ours, field.name)
        if not same and field.name not in (*DESCRIPTION, *unused):
            return field.name
    return None


def _kinds(model: ModelSpec) -> list[LayerKind]:
    return [model.layer_kind(layer) for layer in range(model.num_hidden_layers)]


def keep_config(folder: Path, run: Path) -> None:
    """Copy config and tokenizer of `folder` into the run's directory: for the export, and to go on."""
    kept = run / KEPT
    kept.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", *_TOKENIZER):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, kept / name)
