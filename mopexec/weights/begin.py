"""Beginning a run from a Hugging Face directory: its network is the plan's, every tensor is accounted for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from mopexec.weights.families import Family
from mopexec.weights.files import Weights, read_config
from mopexec.weights.layout import Layout, family_of
from mopexec.weights.source import Source, ToldSource
from mopsim.common.errors import MopError, SpecError
from mopsim.common.units import format_bytes
from mopsim.spec.huggingface import from_config
from mopsim.spec.model import DESCRIPTION, LayerKind, ModelSpec
from mopsim.spec.plan import Plan


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


def told_weights(folder: Path, plan: Plan, say: Callable[[str], None]) -> Source:
    """The same, which tells what is ignored and, while it is read, how far it is. Raises MopError."""
    weights = open_weights(folder, plan)
    if ignored := weights.said_ignored():
        say(ignored)
    size = sum(path.stat().st_size for path in set(weights.files.files.values()))
    say(f"reading weights: {folder} ({format_bytes(size)}; each rank reads what it holds)")
    return ToldSource(weights, say)


def check_rules(folder: Path, plan: Plan) -> None:
    """Refuse to train what weights like those of `folder` cannot hold. Raises MopError."""
    check_rate(family_of(architecture(read_config(folder), folder)), plan)


def check_rate(family: Family, plan: Plan) -> None:
    """Refuse to move a balance bias for which the family's weights have no place. Raises SpecError."""
    rate = plan.training.bias_update_rate
    if plan.model.num_moe_layers and rate and not family.balance_bias:
        rule = (
            f"must be 0: weights of {family.architecture} have no place for a router's balance bias "
            "(--set bias_update_rate=0 from the first step)"
        )
        raise SpecError("plan.training.bias_update_rate", rate, rule)


def architecture(config: dict[str, Any], folder: Path) -> str:
    """The architecture that config.json names. Raises MopError."""
    listed = config.get("architectures")
    if not isinstance(listed, list) or not listed or not isinstance(listed[0], str):
        raise MopError(f"{folder / 'config.json'}: architectures: must be a list with the network's name")
    return listed[0]


def differences(theirs: ModelSpec, ours: ModelSpec) -> list[str]:
    """The fields in which two networks differ, of those that change one."""
    unused: tuple[str, ...] = () if ours.num_dense_layers else ("intermediate_size",)
    if _kinds(theirs) == _kinds(ours):
        unused += ("first_k_dense_replace", "mlp_only_layers", "sliding_window_period", "layer_types")
    return [
        field.name
        for field in msgspec.structs.fields(ModelSpec)
        if getattr(theirs, field.name) != getattr(ours, field.name)
        and field.name not in (*DESCRIPTION, *unused)
    ]


def difference(theirs: ModelSpec, ours: ModelSpec) -> str | None:
    """The first field in which two networks differ, None where they are the same one."""
    return next(iter(differences(theirs, ours)), None)


def _kinds(model: ModelSpec) -> list[LayerKind]:
    return [model.layer_kind(layer) for layer in range(model.num_hidden_layers)]
