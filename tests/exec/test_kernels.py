"""Kernels of the planned device: how many a layer launches; they compute what the composed ones do."""

import os
import shutil
from contextlib import suppress
from typing import Any
from unittest import mock

import msgspec
import pytest
import torch
from torch import Tensor

from mopexec.model import Transformer, swiglu
from mopexec.model.swiglu import grouped_experts
from mopexec.operators import expert_products
from mopexec.operators.activation import Activation, wings_of
from mopexec.operators.dtypes import wide
from mopexec.operators.fused import LEAVES, OPS, split_packed
from mopexec.operators.grouped import Groups, RowCounts, ends_of, expert_order, fits
from mopexec.operators.kernels import prepare, using
from mopexec.operators.looped_products import experts_backward_, experts_forward_
from mopexec.operators.rows import rms_norm, rms_norm_backward_
from mopexec.operators.swiglu import Clamp
from mopexec.operators.ungated import Ungated
from mopexec.weights.load import fill
from mopexec.weights.source import Seeded
from mopsim import strategies
from mopsim.common.errors import SpecError
from mopsim.spec.plan import Plan
from mopsim.spec.presets import load_model
from mopsim.spec.stack import Kernels
from mopsim.spec.stacks import load_stack
from mopsim.spec.training import TrainSpec
from tests.exec.flat_plans import MODEL, make_plan
from tests.exec.kernel_counts import KERNELS, counted_step, layer_kernels
from tests.exec.spawn import pool
from tests.exec.test_flat_units import ALL_TWO
from tests.plans import plan_of
from tests.sim.toys import small

CUDA = load_stack("mopexec-flat").on_kind("cuda").kernels
CPU = load_stack("mopexec-flat").on_kind("cpu").kernels
LATENT: dict[str, Any] = {
    "attention": "mla", "num_key_value_heads": 8, "head_dim": 24, "q_lora_rank": 48, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "rope_interleave": True,
}  # fmt: skip
GPT: dict[str, Any] = {
    "norm": "layernorm", "ffn_matrices": 2, "ffn_activation": "gelu_pytorch_tanh", "ffn_bias": True,
}  # fmt: skip
MOST = {0: 165, 8192: 210, 2048: 400}
"""By tokens of a chunk: as few as were reached."""


def planned(chunk_tokens: int = 0, **options: Any) -> Plan:
    """Qwen3-30B-A3B on 8 cards: 16 experts and 32K tokens a rank."""
    options = {"expert_parallel": 8, "vocab_parallel": 8, "expert_chunk_tokens": chunk_tokens} | options
    strategy = strategies.mop(8, **options)
    seq_len = 32768 * strategy.attention.context_parallel
    training = TrainSpec(seq_len=seq_len, global_batch=strategy.data_groups)
    model = msgspec.structs.replace(load_model("qwen3_30b_a3b"), num_hidden_layers=2)
    return plan_of(model, strategy, training, "cuda")


@pytest.mark.parametrize(
    ("chunk_tokens", "options"), [(0, {"context_parallel": 8}), (8192, {}), (2048, {})], ids=str
)
def test_a_layer_launches_few_kernels(chunk_tokens: int, options: dict[str, Any]) -> None:
    plan = planned(chunk_tokens, **options)
    counted = layer_kernels(plan)
    assert plan.training.tokens_per_rank(plan.strategy) == 32768
    assert 100 < sum(counted.values()) <= MOST[chunk_tokens], counted


@pytest.mark.parametrize("changes", [{}, GPT], ids=["usual", "GPT"])
def test_all_mechanisms_by_the_fused_kernels(changes: dict[str, Any]) -> None:
    model = msgspec.structs.replace(MODEL, **changes)
    plan = make_plan(2, ALL_TWO, micro_batch=2, device_kind="cuda", model=model)
    for worst in pool(2).run("tests.exec.flat_parity", "compare", plan, "learned"):
        assert max(worst.values()) <= 1e-9, worst


FUNCTIONS = ("gelu", "gelu_pytorch_tanh", "relu2", "relu")
ACTIVATIONS = {"plain": None, "clamped": Clamp(1.0, 1.702), **{one: Ungated(one) for one in FUNCTIONS}}
activations = pytest.mark.parametrize("how", ACTIVATIONS.values(), ids=ACTIVATIONS)


def _experts(biased: bool, how: Activation) -> dict[str, Tensor]:
    shapes = {**dict.fromkeys(wings_of(how), (16, 24)), "down": (24, 16)}
    found = {f"moe.experts.{n}_proj": torch.randn(4, *shape).bfloat16() for n, shape in shapes.items()}
    if biased:
        found |= {f"moe.experts.{n}_proj_bias": torch.randn(4, s[1]).bfloat16() for n, s in shapes.items()}
    return found


@activations
@pytest.mark.parametrize("biased", [False, True])
def test_grouped_products_are_those_of_each_expert(how: Activation, biased: bool) -> None:
    torch.manual_seed(0)
    experts, arrived = _experts(biased, how), torch.tensor([[3, 0, 20, 1], [4, 0, 9, 8]])
    counts = arrived.sum(0).tolist()
    inputs, given = (torch.randn(sum(counts), 16).bfloat16() for _ in "ab")
    weights = torch.rand(sum(counts))
    whole = [OPS.pack_back(inputs, weights, None)]
    with using(CUDA):
        assert expert_products.fits(inputs, experts)
        expert_products.forward(whole, ends_of(arrived), experts, how)
    alone = inputs.clone()
    experts_forward_(alone, alone, weights, counts, [experts], how)
    _close(whole[0], alone)

    found = []
    for grouped in (True, False):
        grads = {name: torch.zeros_like(one, dtype=torch.float32) for name, one in experts.items()}
        rows = [inputs.clone(), given.clone()]
        if grouped:
            rows[0] = OPS.pack_back(inputs, weights, None)
            of_weights = expert_products.backward(rows, ends_of(arrived), experts, grads, how)
        else:
            of_weights = experts_backward_(rows[1], rows[0], weights, counts, [experts], [grads], how)
        found.append([rows[-1], of_weights, *grads.values()])
    for mine, other in zip(*found, strict=True):
        _close(mine, other)


@activations
@pytest.mark.parametrize("biased", [False, True])
def test_gradients_of_grouped_products_are_torchs(
    how: Activation, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    arrived = torch.tensor([[3, 0, 20, 1], [4, 0, 9, 8]])
    counts = RowCounts(arrived.tolist(), arrived)
    stacks = {name.removeprefix("moe.experts."): one for name, one in _experts(biased, how).items()}
    x, given = (torch.randn(int(arrived.sum()), 16).bfloat16() for _ in "ab")
    leaves = [one.requires_grad_() for one in (x, *stacks.values())]

    def found() -> list[Tensor]:
        with using(CUDA):
            assert fits(x, stacks)
            out = grouped_experts(x, counts, stacks, how)
        return [out, *torch.autograd.grad(out, leaves, given)]

    ours = found()
    monkeypatch.setattr(swiglu._Product, "apply", lambda name, *given: Groups.product(*given))
    for mine, other in zip(ours, found(), strict=True):
        _close(mine, other)


def test_orders_are_those_of_sorts() -> None:
    arrived = torch.tensor([[3, 0, 20, 1], [4, 0, 9, 8], [0, 5, 1, 0]])
    expert = torch.arange(4).repeat(3).repeat_interleave(arrived.flatten())
    order = expert_order(arrived, int(arrived.sum()))
    assert torch.equal(order, expert.argsort(stable=True))
    assert expert_order(arrived[:1], 24) is expert_order(arrived[:, :1], 7) is None
    chunks = torch.stack((arrived, arrived.flip(0)))
    both = torch.cat([expert_order(one, 51) for one in chunks])
    assert torch.equal(expert_order(chunks, 102), both)


def test_orders_of_chunks_are_those_of_each() -> None:
    chunks, num_experts, experts = 3, 5, torch.randint(5, (11, 2), dtype=torch.int16)
    order = OPS.route_cells(experts, chunks, num_experts).argsort(stable=True)
    owns, inverses = OPS.chunk_orders(order, chunks, 2)
    sizes = [2 * len(experts[i::chunks]) for i in range(chunks)]
    for i, (own, inverse) in enumerate(zip(owns.split(sizes), inverses.split(sizes), strict=True)):
        assert torch.equal(own, experts[i::chunks].flatten().argsort(stable=True))
        assert torch.equal(inverse, own.argsort())


PACKED = {
    "alone": (torch.bfloat16, 8), "unaligned": (torch.bfloat16, 11), "fp32": (torch.float32, 6),
    "fp64": (torch.float64, 6),
}  # fmt: skip


@pytest.mark.parametrize(("dtype", "hidden"), PACKED.values(), ids=PACKED)
def test_rows_travel_with_their_weights(dtype: torch.dtype, hidden: int) -> None:
    x, top_k, chunks = torch.randn(18, hidden, dtype=dtype), 2, 3
    weights = torch.rand(18, top_k, dtype=wide(dtype))
    order = torch.randperm(12)
    given = x[1::chunks], None, 0.0, x[2::chunks], weights[1::chunks], order, top_k
    packed, grads = OPS.pack_routes(*given, False)
    rows, own = split_packed(packed, hidden)
    assert packed.shape[1] * packed.element_size() % 16 == 0
    assert torch.equal(rows, x[1::chunks][order // 2])
    assert torch.equal(grads, x[2::chunks][order // 2])
    assert torch.equal(own, weights[1::chunks].flatten()[order])
    back, of_back = split_packed(OPS.pack_back(rows, own, order), hidden)
    assert torch.equal(back[order], rows)
    assert torch.equal(of_back[order], own)
    inverse, total = order.argsort(), torch.zeros(6, hidden, dtype=dtype)
    OPS.add_routes_(total, rows, inverse, top_k)
    home = torch.empty(18, top_k, dtype=wide(dtype))
    assert torch.equal(OPS.take_routes_(home[1::chunks], rows, own, inverse, top_k), total)
    assert torch.equal(home[1::chunks], weights[1::chunks])
    weighted, ones = split_packed(OPS.pack_routes(*given, True)[0], hidden)
    assert torch.equal(ones, torch.ones_like(own))
    assert torch.equal(weighted, (rows * own[:, None]).to(dtype))


def test_other_dtypes_run_expert_by_expert() -> None:
    experts = {name: one.double() for name, one in _experts(False, None).items()}
    with using(CUDA):
        assert not expert_products.fits(torch.zeros(3, 16, dtype=torch.float64), experts)
    with using(CPU):
        assert not expert_products.fits(torch.zeros(3, 16, dtype=torch.bfloat16), experts)


@pytest.mark.parametrize("kernels", [CUDA, CPU], ids=["fused", "composed"])
def test_norms_equal_torchs(kernels: Kernels) -> None:
    x = torch.randn(7, 3, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(16, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(7, 3, 16, dtype=torch.float64)
    out = torch.nn.functional.rms_norm(x, (16,), weight, 1e-6)
    out.backward(grad)
    with using(kernels), torch.no_grad():
        torch.testing.assert_close(rms_norm(x, weight, 1e-6), out)
        target, of_weight = torch.ones_like(x), torch.ones_like(weight)
        rms_norm_backward_(target, x, grad, weight, of_weight, 1e-6)
    torch.testing.assert_close(target - 1, x.grad)
    torch.testing.assert_close(of_weight - 1, weight.grad)


def _close(actual: Tensor, expected: Tensor) -> None:
    scale = expected.float().abs().max().item()
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0.02, atol=0.02 * scale)


@pytest.mark.parametrize("kernel", ["flash2", "flash3", "cudnn"])
def test_the_stacks_attention_is_played(kernel: str) -> None:
    plan = planned()
    chosen = msgspec.structs.replace(plan.stack.kernels, attention={"default": kernel})
    counted = counted_step(
        msgspec.structs.replace(plan, stack=msgspec.structs.replace(plan.stack, kernels=chosen))
    )
    word = "cudnn" if kernel == "cudnn" else "flash"
    layers = plan.model.num_hidden_layers
    assert counted.by_op[f"aten::_scaled_dot_product_{word}_attention"] == 2 * layers  # and recomputed
    assert counted.by_op[f"aten::_scaled_dot_product_{word}_attention_backward"] == layers


@pytest.mark.parametrize(
    ("architecture", "mask", "op"),
    [
        ("hopper", "causal", "_scaled_dot_product_cudnn_attention"),
        ("hopper", "document", "_flash_attention_forward"),
        ("ampere", "causal", "_scaled_dot_product_flash_attention"),
        ("", "causal", "_scaled_dot_product_flash_attention"),
    ],
)
def test_attention_is_chosen_by_architecture_and_mask(architecture: str, mask: str, op: str) -> None:
    """Of documents one kernel takes all."""
    plan = planned()
    where = msgspec.structs.replace(plan.hardware, architecture=architecture)
    training = msgspec.structs.replace(plan.training, attention_mask=mask)
    counted = counted_step(msgspec.structs.replace(plan, hardware=where, training=training))
    assert counted.by_op[f"aten::{op}"] == 2 * plan.model.num_hidden_layers


def test_an_older_cudnn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose attention is wrong at some lengths."""
    kernels = msgspec.structs.replace(CUDA, attention={"default": "cudnn"})
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91400)
    with pytest.raises(SpecError, match=r"'cudnn' needs cuDNN 9\.15\.1 or newer, found 91400"):
        prepare(kernels)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    prepare(kernels)


def test_an_attention_kernel_that_is_not_there_is_one_line() -> None:
    with pytest.raises(SpecError, match=r"stack.kernels.attention: 'flash3' cannot be activated"):
        prepare(msgspec.structs.replace(CUDA, attention={"default": "flash3"}))


PART = {"partial_rotary_factor": 0.5, "rope_interleave": True}


@pytest.mark.parametrize("changes", [{}, LATENT, PART, GPT], ids=["usual", "latents", "part", "GPT"])
def test_modules_compute_the_same_by_fused_kernels(changes: dict[str, Any]) -> None:
    model = Transformer(small(**changes), torch.float64)
    fill(model, Seeded(0))
    tokens = torch.randint(0, model.spec.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))

    def gradients() -> list[Tensor]:
        loss = model.loss(tokens, tokens)
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    composed = gradients()
    with using(load_stack("mopexec-split").on_kind("cuda").kernels):
        fused = gradients()
    for one, other in zip(fused, composed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert any(not torch.equal(one, other) for one, other in zip(fused, composed, strict=True))


def _arguments() -> dict[str, list[tuple[Any, ...]]]:
    """Of every compiled op, as it is called where it takes the most kernels."""
    tokens, top_k, experts, chunks = 12, 8, 32, 3
    routes = torch.randperm(tokens * top_k)
    rows = torch.randn(tokens * top_k, 64).bfloat16()
    weights, logits = torch.rand(tokens, top_k), torch.randn(tokens, experts)
    chosen = torch.randint(experts, (tokens, top_k), dtype=torch.int16)

    def strided() -> Tensor:
        return torch.randn(chunks * tokens, 64).bfloat16()[1::chunks]

    def wing() -> Tensor:
        return torch.randn(tokens, 32).bfloat16()

    heads, angle = torch.randn(2, tokens, 4, 8).bfloat16(), torch.rand(tokens, 4)
    scale, of_scale = torch.randn(64).bfloat16(), torch.zeros(64)
    most = "gelu_pytorch_tanh"  # most ops of FUNCTIONS
    return {
        "rms_norm_strided": [(torch.randn(tokens, 80).bfloat16()[:, :64], scale, 1e-6)],
        "rms_norm_backward_": [(strided(), strided(), strided(), scale, of_scale, 1e-6, True)],
        "layer_norm_strided": [(torch.randn(tokens, 80).bfloat16()[:, :64], scale, scale, 1e-6)],
        "layer_norm_backward_": [
            (strided(), strided(), strided(), scale, of_scale, torch.zeros(64), 1e-6, True)
        ],
        "rotate_": [(heads.clone(), part, part, True) for part in (angle, angle[:, :2].contiguous())],
        "rotate": [(heads, part, part, True) for part in (angle, angle[:, :2].contiguous())],
        "swiglu": [(wing(), wing())],
        "swiglu_backward": [(wing(), wing(), wing())],
        "swiglu_": [(wing(), wing(), weights[:, 0], 7.0, 1.7)],
        "swiglu_backward_": [
            (wing(), wing(), wing(), share, 7.0, 1.7) for share in (None, weights[:, 0].contiguous())
        ],
        "ungated": [(wing(), most)],
        "ungated_backward": [(wing(), wing(), most)],
        "ungated_": [(wing(), weights[:, 0], most)],
        "ungated_backward_": [(wing(), wing(), share, most) for share in (None, weights[:, 0].contiguous())],
        "route_weights": [(logits, chosen, True, True, 1.0)],
        "route_weights_backward": [(weights, logits, chosen, True, True, 1.0)],
        "add_routes_": [(strided(), rows, routes, top_k)],
        "take_routes_": [(torch.empty_like(weights), rows, torch.rand(len(rows)), routes, top_k)],
        "take_weighted_": [(torch.empty_like(weights), rows, rows[:tokens], weights, routes, top_k)],
        "pack_routes": [
            (rows[:tokens], scale, 1e-6, rows[:tokens], weights, routes, top_k, weighted)
            for weighted in (False, True)
        ],
        "pack_back": [(rows, torch.rand(len(rows)), routes)],
        "route_cells": [(chosen, chunks, experts)],
        "chunk_orders": [(routes, chunks, top_k)],
        "arrival_order": [(torch.tensor([[3, 0, 20, 1], [4, 0, 9, 8]]), 45)],
    }


class _Called(Exception):  # noqa: N818
    """A kernel of Inductor is called."""


def _called(*_: Any) -> None:
    raise _Called


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="KERNELS are those of torch 2.13")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler of C++")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@mock.patch.dict(os.environ)  # the compiler writes there
def test_compiled_ops_have_the_kernels_that_inductor_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their code is written and counted, not compiled: the first kernel that is called ends the call."""
    from torch._inductor import metrics
    from torch._inductor.async_compile import AsyncCompile

    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *_: _called)
    monkeypatch.setattr("torch._inductor.config.cpp.vec_isa_ok", True)  # else it compiles to find out
    arguments, found = _arguments(), dict.fromkeys(LEAVES, 0)
    assert arguments.keys() == LEAVES.keys()
    assert KERNELS.keys() <= LEAVES.keys()
    for name, calls in arguments.items():
        for given in calls:
            torch._dynamo.reset()
            metrics.reset()
            with suppress(_Called):
                torch.compile(LEAVES[name], dynamic=True, fullgraph=True)(*given)
            found[name] = max(found[name], metrics.generated_kernel_count)
    assert found == {name: KERNELS.get(name, 1) for name in LEAVES}
