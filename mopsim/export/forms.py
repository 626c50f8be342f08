"""The forms of configuration files: the text of a plan's sections and remarks in each."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mopsim.common.errors import SpecError
from mopsim.common.io import as_json, to_yaml
from mopsim.export.target import header, target
from mopsim.spec.capability import Side
from mopsim.spec.capability.expressions import flavor_of
from mopsim.spec.plan import Plan

Sections = dict[str, Any]


def text_of(side: Side, plan: Plan, gaps: Sequence[SpecError]) -> str:
    """A plan's configuration. gaps: what the target cannot say of it."""
    one = target(side)
    found = one.said(plan, gaps)
    remarks = list(one.remarks_of(plan, found))
    if one.form == "json":  # remarks under '_about' and '_not_expressed'
        about: Sections = {"_about": [*header(side, plan, []), *remarks]}
        untold = {"_not_expressed": [str(gap) for gap in gaps]} if gaps else {}
        return as_json(about | untold | found, indent=2) + "\n"
    head = "".join(f"# {line}\n" for line in (*header(side, plan, gaps), *remarks))
    if one.form == "module":
        return head + _module(side, plan, found, gaps)
    return head + (to_yaml(found) if one.form == "yaml" else _toml(found))


def _toml(found: Sections) -> str:
    """Values of these kinds are written in TOML as in JSON."""
    lines: list[str] = []
    for name, keys in found.items():
        lines += ["", f"[{name}]"]
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in keys.items()]
    return "\n".join([*lines, ""])


class Code(str):
    """An expression of a module."""

    __slots__ = ()


def _made(what: str, given: Mapping[str, Any]) -> Code:
    return Code(f"{what}({', '.join(f'{key}={_said(value)}' for key, value in given.items())})")


def _said(value: Any) -> str:
    """A value as an expression."""
    if isinstance(value, list):
        return f"[{', '.join(map(_said, value))}]"
    return json.dumps(value) if type(value) is str else str(value)


DATA = 'GrainDataLoader.Config(dataset=ConcatThenSplitPackingConfig(dataset=DATASETS["c4"]))'


def _loss(plan: Plan, gaps: Sequence[SpecError]) -> Code:
    heads, loss = plan.model.num_nextn_predict_layers, plan.strategy.vocabulary
    vocabulary = {"global_vocab_size": Code("decoder_vocab_size(model_spec)")}
    found = _made("MTPLoss.Config" if heads else "CrossEntropyLoss.Config", vocabulary)
    untold = any(gap.field.startswith("strategy.vocabulary.") for gap in gaps)
    if loss.loss != "chunked" or not loss.chunk_tokens or untold:
        return found
    chunks = plan.training.tokens_per_rank(plan.strategy) // loss.chunk_tokens
    return _made("ChunkedLossWrapper.Config", {"num_chunks": chunks, "loss_fn": found})


def _function(
    plan: Plan, found: Sections, made: Mapping[str, str], gaps: Sequence[SpecError]
) -> Iterator[str]:
    """The lines of the function that makes a Trainer.Config. made: what makes each section."""
    lines = {name: [f"{key}={_said(value)}," for key, value in one.items()] for name, one in found.items()}
    activations = plan.strategy.activations
    how = "SelectiveAC" if activations.save_ops else "FullAC"
    recomputed = "None" if activations.recompute == "none" else f"{how}.Config()"
    yield "def plan() -> Trainer.Config:"
    yield "    model_spec = model_registry("
    yield from (f"        {line}" for line in lines.pop("model_spec"))
    yield "    )"
    yield "    return Trainer.Config("
    yield "        model_spec=model_spec,"
    yield f"        loss={_loss(plan, gaps)},"
    yield f"        dataloader={DATA},"
    yield f"        activation_checkpoint={recomputed},"
    for name, keys in lines.items():
        yield f"        {name}={made[name]}("
        yield from (f"            {line}" for line in keys)
        yield "        ),"
    yield "    )"


def _module(side: Side, plan: Plan, found: Sections, gaps: Sequence[SpecError]) -> str:
    """A Python module of torchtitan's."""
    tables = target(side).tables
    if converters := tables["converters"].get(plan.strategy.precision.matmul):
        compiled = {"model_compile_enabled": found["compile"]["enable"]}
        found["model_spec"]["converters"] = [
            _made(f"{name}.Config", given | compiled) for name, given in converters.items()
        ]
    made = list(_function(plan, found, tables["made"], gaps))
    named = set(re.findall(r"\w+", "\n".join(made)))
    used = {place: [name for name in names if name in named] for place, names in tables["places"].items()}
    used[f"models.{flavor_of(side, plan.model.name)[0] or 'YOUR_MODEL'}"] = ["model_registry"]
    imports = [
        f"from torchtitan.{place} import {', '.join(used[place])}" for place in sorted(used) if used[place]
    ]
    return "\n".join(["", *imports, "", "", *made, ""])
