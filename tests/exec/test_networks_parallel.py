"""Every network trained in parallel equals the single-device model in float64: loss, gradients, weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from mopexec.check.scale_down import scale_down
from mopexec.check.verify import ROUNDED, TOLERANCE, _relative
from mopexec.run.supported import check_supported
from mopsim.common import io
from mopsim.spec.capability import model_refusals, runnable
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import Plan
from mopsim.spec.presets import list_models, load_model
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, mop, zero_offload
from tests.exec.spawn import pool
from tests.plans import plan_of, split

QUANTITIES = ("loss", "grad_norm", "gradients", "weights")
EVERYTHING: dict[str, Any] = {
    "expert_parallel": 2, "context_parallel": 2, "recompute": "full", "loss": "chunked",
    "loss_chunk_tokens": 5,
}  # fmt: skip
AUXILIARY = {"router_aux_loss_coef": 0.01, "router_z_loss_coef": 0.01, "mtp_loss_coef": 0.3}


def small(model: ModelSpec, strategy: Strategy, **training: Any) -> Plan:
    """The plan on two ranks, scaled down."""
    steps = TrainSpec(seq_len=32, global_batch=4 * strategy.data_groups, **training)
    return scale_down(plan_of(model, strategy, steps), 2)


def check(plan: Plan, masked: bool = False) -> None:
    check_supported(plan)
    found = pool(2).run("tests.exec.network_parity", "differences", plan, masked)[0]
    assert max(found[name] for name in QUANTITIES) <= TOLERANCE, found


RUN = [name for name in list_models() if not list(model_refusals(load_model(name)))]
"""Networks that mopexec runs."""


def modules(name: str) -> Plan:
    model = load_model(name)
    return small(model, fsdp2(2, **_fitting(model, EVERYTHING)), **AUXILIARY)


def flat(name: str) -> Plan | None:
    """None where flat_units refuses the network."""
    model = load_model(name)
    strategy = mop(2, **_fitting(model, FLAT))
    return small(model, strategy, **AUXILIARY) if runnable(strategy, model) is None else None


def _fitting(model: ModelSpec, options: dict[str, Any]) -> dict[str, Any]:
    return options if model.num_moe_layers else options | {"expert_parallel": 1}


TOLD: dict[str, Any] = {
    "name": "any", "source": "", "assumptions": (), "total_params": None, "active_params": None
}  # fmt: skip
"""Fields that say what a network is called, not what it has."""


def apart(make: Callable[[str], Plan | None]) -> list[Any]:
    """Plans of RUN, those that are the same once scaled down as one."""
    names: dict[str, list[str]] = {}
    for name in RUN:
        plan = make(name)
        if plan is None:
            continue
        names.setdefault(io.digest(replace(plan, model=replace(plan.model, **TOLD))), []).append(name)
    return [pytest.param(make(same[0]), id=f"{make.__name__}: {' '.join(same)}") for same in names.values()]


FLAT: dict[str, Any] = {
    "expert_parallel": 2, "context_parallel": 2, "vocab_parallel": 2, "expert_chunk_tokens": 1024,
    "ffn_chunk_tokens": 1024, "loss_chunk_tokens": 1024,
}  # fmt: skip


def values(plan: Plan) -> dict[str, str]:
    """What the network has of each field; of ratios, whether they are 1, less or more. And the stack."""
    found = {name: getattr(plan.model, name) for name in ModelSpec.__struct_fields__ if name not in TOLD}
    found["stack"] = plan.strategy.stack
    return {
        name: str((one > 1) - (one < 1) if isinstance(one, float) else one) for name, one in found.items()
    }


def covering(plans: list[Any]) -> list[Any]:
    """Some of the plans: a value of a field that a runtime has in one of all, it has in one of these."""
    found = [values(one.values[0]) for one in plans]
    known = [{(one["stack"], *field) for field in one.items()} for one in found]
    taken, left = [], set().union(*known)
    while left:
        taken.append(max(range(len(plans)), key=lambda at: len(known[at] & left)))
        left -= known[taken[-1]]
    return [plans[at] for at in sorted(taken)]


@pytest.mark.parametrize("plan", covering([*apart(modules), *apart(flat)]))
def test_what_presets_have_trains(plan: Plan) -> None:
    check(plan)


TEMPERED: dict[str, Any] = {
    "attention_chunk_size": 7, "full_attention_rotary": False, "attn_temperature_tuning": True,
    "layer_types": (*["chunked_attention"] * 3, "full_attention"),
}  # fmt: skip
SWITCHES: dict[str, dict[str, Any]] = {
    "tied, gated shared expert": {"tie_word_embeddings": True, "shared_expert_gate": True},
    "two matrices, rotation of part of a head": {
        "ffn_matrices": 2, "ffn_activation": "relu2", "expert_bias": True, "partial_rotary_factor": 0.5,
    },
    "LayerNorm, gated shared expert of two matrices": {
        "norm": "layernorm", "ffn_matrices": 2, "shared_expert_gate": True,
    },
    "LayerNorm without a bias, windows of some layers": {
        "norm": "layernorm", "norm_bias": False, "attention_bias": "qkv",
        "sliding_window": 5, "layer_types": (*["sliding_attention"] * 3, "full_attention"),
    },
    "learned positions": {"learned_positions": 64},
    "biases, two MTP modules": {
        "attention_bias": "qkvo", "ffn_bias": True, "router_bias": True, "expert_bias": True,
        "num_nextn_predict_layers": 2,
    },
    "full norm, rotation of neighbours in part of a head": {
        "qk_norm": "full", "partial_rotary_factor": 0.5, "rope_interleave": True,
    },
    "dense layers between, windows of some layers": {
        "num_hidden_layers": 5, "mlp_only_layers": (2, 4), "sliding_window": 5,
        "layer_types": (*["sliding_attention"] * 2, *["full_attention"] * 2, "sliding_attention"),
    },
    "norms without weights, queries scaled by position": TEMPERED | {"qk_norm": "unweighted"},
    "queries scaled by position in the explicit block": TEMPERED,
    "weighted inputs of experts": {"expert_inputs_weighted": True, "norm_topk_prob": False},
    "weighted inputs, LayerNorm": {
        "expert_inputs_weighted": True, "norm": "layernorm", "expert_bias": True, "shared_expert_gate": True,
    },
}  # fmt: skip
"""Each differs from "tiny" in what one part of a layer reads: what stands together is of different parts, and
takes attention's block, explicit or composed, that each alone would."""


BY_STAGES = {"tie_word_embeddings", "learned_positions", "num_nextn_predict_layers", "layer_types"}
"""Fields of the network's ends, and of layers by their place, which stages split."""


@pytest.mark.parametrize("switch", SWITCHES)
def test_what_no_preset_has(switch: str) -> None:
    """Layers of fully_shard are recomputed in every second network, by modules that split_modules has too: it
    has what its stages split of networks that lie so."""
    model = replace(load_model("tiny"), **SWITCHES[switch])
    again = {"recompute": ("full", "none")[list(SWITCHES).index(switch) % 2]}
    check(small(model, fsdp2(2, **EVERYTHING | again, offload=True), **AUXILIARY))
    check(small(model, mop(2, **FLAT), **AUXILIARY))
    if BY_STAGES & SWITCHES[switch].keys():
        parts = [split(2, dtype="float64", **{way: 2}) for way in ("pipeline_parallel", "expert_parallel")]
        check(small(model, next(one for one in parts if runnable(one, model) is None), **AUXILIARY))


@pytest.mark.parametrize(
    "strategy",
    [
        fsdp2(2, **EVERYTHING),
        mop(2, **FLAT),
        mop(2, **FLAT | {"context_parallel": 1}, fsdp=1),
        zero_offload(2, dtype="float64", loss="full"),
        split(2, dtype="float64", context_parallel=2),
        split(2, dtype="float64", tensor_parallel=2),
    ],
    ids=[
        "fully_shard",
        "flat_units",
        "flat_units, whole",
        "ZeRO-Offload",
        "split_modules, context",
        "split_modules, tensor",
    ],
)
def test_mtp_modules_read_tokens_that_do_not_count(strategy: Strategy) -> None:
    model = replace(load_model("tiny"), num_nextn_predict_layers=2)
    check(small(model, strategy, **AUXILIARY), masked=True)


@pytest.mark.parametrize(
    "strategy",
    [
        fsdp2(2, **EVERYTHING),
        mop(2, **FLAT),
        split(2, dtype="float64", tensor_parallel=2, expert_parallel=2),
        split(2, dtype="float64", expert_parallel=2, optimizer_on_host=1.0),
    ],
    ids=["fully_shard", "flat_units", "split_modules", "split_modules, host"],
)
def test_what_no_loss_reaches_is_left_as_it_is(strategy: Strategy) -> None:
    """No weight decay either, as of torch's AdamW: MTP modules without weight shrank with every step."""
    model = replace(load_model("tiny"), num_nextn_predict_layers=2)
    check(small(model, strategy, weight_decay=0.5, mtp_loss_coef=0.0))


@pytest.mark.parametrize(
    "strategy",
    [fsdp2(2, **EVERYTHING), mop(2, **FLAT), split(2, dtype="float64", expert_parallel=2)],
    ids=["fully_shard", "flat_units", "split_modules"],
)
def test_what_the_loss_does_not_depend_on(strategy: Strategy) -> None:
    """The weight of a token's one expert is 1 whatever the router says, whose gradient is rounding."""
    model = replace(load_model("tiny"), num_experts_per_tok=1, norm_topk_prob=True, router_bias=True)
    check(small(model, strategy))


def test_a_gradient_that_is_more_than_rounding_differs() -> None:
    """Of one that is rounding itself, and of others."""
    for largest, wrong in ((1e-19, 1e-14), (1.0, 1e-8)):
        theirs = torch.tensor([largest, 0.0], dtype=torch.float64)
        assert _relative(theirs + wrong, theirs, ROUNDED) > TOLERANCE
    assert _relative(torch.tensor([2e-19]), torch.tensor([1e-19], dtype=torch.float64), ROUNDED) < TOLERANCE


@pytest.mark.parametrize("family", [fsdp2, mop, split])
def test_gradients_below_the_limit_are_not_scaled(family: Any) -> None:
    strategy = family(2, expert_parallel=2, dtype="float64")
    plan = small(load_model("tiny"), strategy)
    check(replace(plan, training=replace(plan.training, clip_norm=1e3)))


GPT: dict[str, Any] = {
    "learned_positions": 64, "norm": "layernorm", "ffn_matrices": 2, "attention_bias": "qkvo",
    "ffn_bias": True, "num_nextn_predict_layers": 0,
}  # fmt: skip


POSITIONED: dict[str, Strategy] = {
    "fully_shard": fsdp2(2, **EVERYTHING),
    "flat_units": mop(2, **FLAT),
    "context": split(2, dtype="float64", context_parallel=2, context_exchange="ulysses"),
    "tensors": split(2, dtype="float64", tensor_parallel=2, expert_parallel=2),
    "stages": split(2, dtype="float64", pipeline_parallel=2),
}


@pytest.mark.parametrize(
    ("name", "mask"), [*((name, "document") for name in POSITIONED), ("context", "causal")]
)
def test_learned_positions_restart_with_each_document(name: str, mask: str) -> None:
    """Without documents where a sequence is split: in the other runtimes test_what_no_preset_has."""
    strategy = replace(POSITIONED[name], micro_batch=2)
    check(small(replace(load_model("tiny"), **GPT), strategy, attention_mask=mask))


@pytest.mark.parametrize(
    ("family", "name", "ranks"),
    [
        (fsdp2, "gpt_oss_20b", 1),
        (mop, "gpt_oss_20b", 2),
        (fsdp2, "deepseek_v3", 2),
        (mop, "deepseek_v3", 1),
    ],
)
def test_packed_documents_are_trained_as_if_each_were_alone(family: Any, name: str, ranks: int) -> None:
    """The single-device model takes them one by one. Windows and sinks, latent attention; ranks: of a
    sequence."""
    options = FLAT if family is mop else EVERYTHING
    strategy = replace(family(2, **options | {"context_parallel": ranks}), micro_batch=2)
    model = replace(load_model(name), num_nextn_predict_layers=0)
    check(small(model, strategy, attention_mask="document"))
