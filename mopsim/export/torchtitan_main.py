"""TorchTitan's main branch, after v0.2.2: a Python module whose function returns its Trainer.Config."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mopsim.common.errors import SpecError
from mopsim.export import torchtitan
from mopsim.export.target import Target, header, keys_of, unsaid
from mopsim.spec.capability import SIDES
from mopsim.spec.plan import Plan

CHECKED = (
    "torchtitan main (commit b5bcd76c of 2026-08-21): torchtitan/trainer.py, config/configs.py, "
    "config/README.md, components/quantization, distributed/activation_checkpoint.py"
)
NAME = "torchtitan-main"
KEYS = keys_of(NAME)


class Code(str):
    """An expression of the module."""

    __slots__ = ()


DATA = 'GrainDataLoader.Config(dataset=ConcatThenSplitPackingConfig(dataset=DATASETS["c4"]))'


def sections(plan: Plan) -> dict[str, dict[str, Any]]:
    """Sections of the Trainer.Config, and their keys. A graph of the whole step is another program than the
    one that was planned, and refused beside most dispatchers: off."""
    s, t = plan.strategy, plan.training
    before = torchtitan.sections(plan)
    found: dict[str, dict[str, Any]] = {"model_spec": _model(plan)}
    for name, keys in KEYS["like_v0_2_2"].items():
        found[name] = {key: before[name][key] for key in keys if key in before[name]}
    found["training"] |= {
        "num_tokens_per_microbatch_per_dp_rank": s.micro_batch * t.seq_len,
        "num_tokens_per_train_step": t.global_batch * t.seq_len,
        "max_context_length": t.seq_len,
        "disable_cuda_graphs": True,
    }
    if s.pipeline.pipeline_parallel > 1:
        found["parallelism"]["num_pp_microbatches"] = before["training"]["local_batch_size"] // s.micro_batch
    found["optimizer"] = {
        "lr": t.learning_rate,
        "betas": (t.beta1, t.beta2),
        "eps": t.eps,
        "weight_decay": t.weight_decay,
    }
    return found


def _model(plan: Plan) -> dict[str, Any]:
    s = plan.strategy
    found: dict[str, Any] = {"flavor": SIDES[NAME]["flavors"].get(plan.model.name, ("", ""))[1]}
    if s.experts.sends_once:
        found["moe_comm_backend"] = s.experts.token_dispatcher
    if s.attention.context_parallel > 1:
        found["attn_backend"] = "flex"  # which alone it splits
    if plan.model.num_nextn_predict_layers:
        found["num_mtp_layers"] = plan.model.num_nextn_predict_layers
    compiled = {"model_compile_enabled": torchtitan.compiled(plan)}
    if converters := KEYS["converters"].get(s.precision.matmul):
        found["converters"] = [
            _made(f"{name}.Config", given | compiled) for name, given in converters.items()
        ]
    return found


def _loss(plan: Plan, left_out: Sequence[SpecError]) -> Code:
    heads, loss = plan.model.num_nextn_predict_layers, plan.strategy.vocabulary
    vocabulary = {"global_vocab_size": Code("decoder_vocab_size(model_spec)")}
    found = _made("MTPLoss.Config" if heads else "CrossEntropyLoss.Config", vocabulary)
    untold = any(gap.field.startswith("strategy.vocabulary.") for gap in left_out)
    if loss.loss != "chunked" or not loss.chunk_tokens or untold:
        return found
    chunks = plan.training.tokens_per_rank(plan.strategy) // loss.chunk_tokens
    return _made("ChunkedLossWrapper.Config", {"num_chunks": chunks, "loss_fn": found})


def _made(what: str, given: Mapping[str, Any]) -> Code:
    return Code(f"{what}({', '.join(f'{key}={_said(value)}' for key, value in given.items())})")


def _said(value: Any) -> str:
    """A value as an expression."""
    if isinstance(value, list):
        return f"[{', '.join(map(_said, value))}]"
    return json.dumps(value) if type(value) is str else str(value)


def _function(plan: Plan, found: dict[str, dict[str, Any]], left_out: Sequence[SpecError]) -> Iterator[str]:
    """Its lines."""
    made = {name: [f"{key}={_said(value)}," for key, value in one.items()] for name, one in found.items()}
    activations = plan.strategy.activations
    how = "SelectiveAC" if activations.save_ops else "FullAC"
    recomputed = "None" if activations.recompute == "none" else f"{how}.Config()"
    yield "def plan() -> Trainer.Config:"
    yield "    model_spec = model_registry("
    yield from (f"        {line}" for line in made.pop("model_spec"))
    yield "    )"
    yield "    return Trainer.Config("
    yield "        model_spec=model_spec,"
    yield f"        loss={_loss(plan, left_out)},"
    yield f"        dataloader={DATA},"
    yield f"        activation_checkpoint={recomputed},"
    for name, lines in made.items():
        yield f"        {name}={KEYS['made'][name]}("
        yield from (f"            {line}" for line in lines)
        yield "        ),"
    yield "    )"


def _documents(plan: Plan) -> Iterator[str]:
    """What its mask, which no configuration changes, makes of the plan's: positions of the data say where
    documents end (components/data/packing.py)."""
    training = plan.training
    if training.attention_mask == "causal":
        yield (
            "There a token attends to its own document alone, in the plan to all before it "
            "(training.attention_mask causal): predicted times are upper estimates where there are several"
        )
    elif training.document_tokens:
        length = f"{training.own_document} tokens (training.document_tokens)"
        yield f"Predicted for documents of {length}: those of the data decide"


def render(plan: Plan, left_out: Sequence[SpecError]) -> str:
    """The module's text."""
    lines = [f"# {line}" for line in header("TorchTitan", CHECKED, plan, left_out, NAME)]
    lines.append("# To run: MODULE=<this file's name> CONFIG=plan ./run_train.sh, its folder on PYTHONPATH")
    lines.append("# To be set: hf_assets_path, the data set, training.steps")
    lines += [f"# {line}" for line in _documents(plan)]
    made = list(_function(plan, unsaid(sections(plan), left_out, NAME), left_out))
    model = SIDES[NAME]["flavors"].get(plan.model.name, ("YOUR_MODEL",))[0]
    named = set(re.findall(r"\w+", "\n".join(made)))
    used = {place: [name for name in names if name in named] for place, names in KEYS["places"].items()}
    used |= {f"models.{model}": ["model_registry"]}
    lines.append("")
    lines += [
        f"from torchtitan.{place} import {', '.join(used[place])}" for place in sorted(used) if used[place]
    ]
    return "\n".join([*lines, "", "", *made, ""])


TORCHTITAN_MAIN = Target(NAME, CHECKED, render)
