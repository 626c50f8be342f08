"""The reference model against torch's own ops, and its names against the declared ones."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mopexec.model import Routing, Transformer
from mopexec.model.attention import causal_attention
from mopexec.model.auxiliary import Auxiliary
from mopexec.model.initialize import initial_value
from mopexec.model.routing import largest_share, load_histogram, profile_experts
from mopexec.model.swiglu import activate
from mopexec.operators.activation import activated, activated_backward, fused_backward_
from mopexec.operators.attention_core import Core
from mopexec.operators.documents import cumulative
from mopexec.operators.kernels import using
from mopexec.operators.norms import LayerNorms
from mopexec.operators.router import route_weights, route_weights_backward, router_scores
from mopexec.operators.swiglu import Clamp
from mopexec.operators.ungated import Ungated
from mopexec.weights.load import fill
from mopexec.weights.source import Seeded
from mopsim import graph
from mopsim.common.errors import SpecError
from mopsim.spec.model import ModelSpec
from mopsim.spec.routing import RoutingProfile
from mopsim.spec.stacks import load_stack
from tests.routed import routed_expert


def spec(**changes: object) -> ModelSpec:
    fields: dict[str, object] = {
        "name": "t",
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "vocab_size": 37,
        "intermediate_size": 24,
        "first_k_dense_replace": 1,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 8,
        "qk_norm": "head",
    }
    return ModelSpec(**(fields | changes))


LATENT: dict[str, object] = {
    "attention": "mla", "qk_norm": "none", "head_dim": 6, "q_lora_rank": 10, "kv_lora_rank": 8,
    "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
NO_EXPERTS = dict.fromkeys(
    (
        "num_local_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "first_k_dense_replace",
        "shared_expert_intermediate_size",
    ),
    0,
)


def test_parameter_names_and_shapes_are_the_declared_ones() -> None:
    for changes in (
        {},
        {"qk_norm": "none", "shared_expert_intermediate_size": 0},
        NO_EXPERTS,
        {"qk_norm": "full", "attention_bias": "qkvo", "attention_sinks": True, "ffn_bias": True},
        {"expert_bias": True, "router_bias": True, "shared_expert_gate": True, "tie_word_embeddings": True},
        {**LATENT, "num_nextn_predict_layers": 2},
        {**LATENT, "q_lora_rank": 0},
        {"ffn_matrices": 2, "expert_bias": True},
        {**LATENT, "num_nextn_predict_layers": 1, "norm": "layernorm"},
        {"norm": "layernorm", "norm_bias": False, "learned_positions": 64},
        NO_EXPERTS | {"ffn_matrices": 2, "ffn_bias": True},
    ):
        model = Transformer(spec(**changes), torch.float32)
        actual = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert actual == graph.parameters(spec(**changes))


def test_the_busiest_rank_of_an_expert_parallel_group() -> None:
    load = torch.tensor([[4, 2, 1, 1], [1, 1, 1, 1]])
    assert float(largest_share(load, 2)) == pytest.approx((0.75 + 0.5) / 2)
    assert float(largest_share(load, 1)) == 1.0
    assert torch.isnan(largest_share(torch.zeros(1, 4), 2))


def test_ends_of_documents_one_behind_the_other() -> None:
    ends, longest = cumulative(((3, 8), (8,)), torch.device("cpu"))
    assert (ends.tolist(), ends.dtype, longest) == ([0, 3, 8, 16], torch.int32, 8)


def test_experts_by_their_load() -> None:
    load = torch.tensor([[4.0, 4.0, 4.0, 4.0], [0.0, 1.0, 15.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert load_histogram(load).tolist() == [2, 0, 1, 0, 4, 1, 0, 0]  # a layer without routes says nothing
    assert load_histogram(torch.tensor([[64.0] + [0.0] * 7])).tolist() == [7, 0, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_causal_attention_equals_the_plain_formula(kv_heads: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 9, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 9, kv_heads, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    key, value = (t.repeat_interleave(4 // kv_heads, dim=2) for t in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q, key) / 8**0.5
    expected = torch.einsum("bhst,bthd->bshd", scores.masked_fill(~mask, float("-inf")).softmax(-1), value)
    actual = causal_attention(q, k, v, Core(8**-0.5))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(actual, (q, k, v), grad),
        torch.autograd.grad(expected, (q, k, v), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


SHARES = (0.3, 0.05, 0.05, 0.1, 0.0, 0.2, 0.2, 0.1)


@pytest.mark.parametrize("profile", ["balanced", "80/3", "50/8", "30/20", "zipf:1.2", SHARES])
def test_profile_table_is_that_of_the_spec(profile: RoutingProfile) -> None:
    table = profile_experts(profile, 11, 8, 3, torch.device("cpu"))
    assert table.tolist() == [[routed_expert(profile, i, 11, j, 8, 3) for j in range(3)] for i in range(11)]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalised", [True, False])
def test_router_backward_equals_autograd(scoring: str, normalised: bool) -> None:
    model = spec(scoring_func=scoring, norm_topk_prob=normalised, routed_scaling_factor=1.7)
    torch.manual_seed(1)
    logits = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    experts = torch.randint(0, 8, (6, 2))
    experts[:3, 1] = experts[:3, 0]  # a profile may name one expert twice
    grad = torch.randn(6, 2, dtype=torch.float64)
    weights = route_weights(router_scores(logits, model), experts, model)
    (expected,) = torch.autograd.grad(weights, logits, grad)
    actual = route_weights_backward(grad, router_scores(logits.detach(), model), experts, model)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_and_gradients_exist_in_every_dtype(dtype: torch.dtype) -> None:
    model = Transformer(spec(scoring_func="sigmoid"), dtype)
    fill(model, Seeded(0))
    tokens = torch.arange(24).view(2, 12) % 37
    loss = model.loss(tokens, tokens)
    loss.backward()
    assert abs(loss.item() / 24 - torch.tensor(37.0).log().item()) < 0.1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_initial_weights_depend_on_name_and_seed_only() -> None:
    first, second = Transformer(spec(), torch.float32), Transformer(spec(), torch.float64)
    fill(first, Seeded(3))
    fill(second, Seeded(3))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a.double(), b)
    fill(second, Seeded(4))
    assert not torch.equal(first.embedding.weight.double(), second.embedding.weight)


def test_a_slice_of_a_sequence_is_positioned_by_its_start() -> None:
    model = Transformer(spec(**NO_EXPERTS, num_hidden_layers=1), torch.float64)
    fill(model, Seeded(0))
    tokens = torch.tensor([[5, 5, 5, 5]])
    hidden = model(tokens, start=3)
    assert hidden.shape == (1, 4, 16)
    q = F.linear(model.embedding(tokens), model.layers[0].attention.q_proj.weight)
    assert q.isfinite().all()


def test_initial_values_are_of_the_seed_the_name_and_the_expert() -> None:
    stack = "a.experts.up_proj"
    given = [
        ("a.weight", 0, None),
        ("b.weight", 0, None),
        ("a.weight", 1, None),
        (stack, 0, 0),
        (stack, 0, 1),
    ]
    drawn, again = ([initial_value(name, (8,), *rest) for name, *rest in given] for _ in range(2))
    assert all(map(torch.equal, drawn, again))
    assert len({tuple(values.tolist()) for values in drawn}) == len(given)


def test_balancing_raises_the_bias_of_underused_experts() -> None:
    model = Transformer(spec(), torch.float64, routing=Routing())
    fill(model, Seeded(0))
    tokens = torch.arange(24).view(2, 12) % 37
    model.loss(tokens, tokens)
    router = model.layers[1].moe.router
    load = router.load.clone()
    assert load.sum() == 48
    model.update_balance(0.01)
    assert torch.equal(router.balance_bias, 0.01 * torch.sign(load.mean() - load))
    assert router.load.sum() == 0


def test_unsupported_models_are_refused_by_name() -> None:
    with pytest.raises(SpecError, match=r"model\.dropout"):
        Transformer(spec(dropout=0.1), torch.float32)


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, core: Core, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Attention by the whole square of products: a window, a sink in the softmax."""
    repeats, length = q.shape[2] // k.shape[2], q.shape[1]
    key, value = (t.repeat_interleave(repeats, dim=2) for t in (k, v))
    behind = torch.arange(length)[:, None] - torch.arange(length)
    seen = (behind >= 0) & (behind < (core.window or length))
    scores = torch.einsum("bshd,bthd->bhst", q, key) * core.scale
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks[None, :, None, None].expand(q.shape[0], -1, length, 1)), dim=-1)
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1)[..., :length], value)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("window", [0, 1, 3, 4, 11, 40])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("widths", [(8, 8), (8, 4), (4, 8)])
def test_windows_sinks_and_widths(
    kv_heads: int, window: int, with_sinks: bool, widths: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    shapes = [(2, 11, 4, widths[0]), (2, 11, kv_heads, widths[0]), (2, 11, kv_heads, widths[1])]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True) if with_sinks else None
    core = Core(0.3, window)
    expected = plain_attention(*inputs, core, sinks)
    actual = causal_attention(*inputs, core, sinks)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    leaves, grad = [*inputs, *([] if sinks is None else [sinks])], torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(actual, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_clamped_swiglu_equals_autograd() -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(40, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    low, high = gate.clamp(max=0.7), up.clamp(-0.7, 0.7)
    expected = (high + 1) * low * (1.7 * low).sigmoid()
    actual = activate((gate, up), Clamp(0.7, 1.7))
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(actual, (gate, up), grad),
        torch.autograd.grad(expected, (gate, up), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("function", "formula"),
    [
        ("gelu", lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))),
        (
            "gelu_pytorch_tanh",
            lambda x: 0.5 * x * (1 + ((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh()),
        ),
        ("relu2", lambda x: x.clamp(min=0) ** 2),
        ("relu", lambda x: x.clamp(min=0)),
    ],
)
def test_an_activation_without_a_gate_equals_autograd(function: str, formula: Any) -> None:
    torch.manual_seed(0)
    how, up = Ungated(function), torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    share = torch.rand(40, dtype=torch.float64, requires_grad=True)
    expected, grad = formula(up), torch.randn(40, 6, dtype=torch.float64)
    (of_up,) = torch.autograd.grad(expected, up, grad, retain_graph=True)
    actual = activate((up,), how)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, up, grad)[0], of_up)
    copies = [one.detach().clone() for one in (up, grad)]
    inner, _ = activated(copies[:1], how)
    torch.testing.assert_close(inner, expected)
    torch.testing.assert_close(activated_backward(copies[1], copies[:1], None, how)[0], of_up)
    weighted = [up.detach().clone(), grad.clone()]
    of_share = fused_backward_(weighted[1], weighted[:1], share.detach(), how)
    wanted = torch.autograd.grad(expected * share[:, None], (up, share), grad)
    for one, other in zip((weighted[0], of_share), wanted, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(weighted[1], expected * share[:, None])


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("way", ["composed", "one kernel"])
def test_layer_norm_equals_torchs(way: str, biased: bool) -> None:
    torch.manual_seed(0)
    x, given = (torch.randn(70, 12, dtype=torch.float64)[::2] for _ in "xg")
    weight, bias = (torch.randn(12, dtype=torch.float64, requires_grad=True) for _ in "wb")
    leaves = [x.clone().requires_grad_(), weight, *([bias] if biased else [])]
    expected = F.layer_norm(leaves[0], (12,), weight, bias if biased else None, 1e-5)
    wanted = torch.autograd.grad(expected, leaves, given)
    names = ["norm.weight", *(["norm.bias"] if biased else [])]
    weights = {name: one.detach() for name, one in zip(names, leaves[1:], strict=True)}
    grads = {name: torch.zeros_like(one) for name, one in weights.items()}
    norms, target = LayerNorms(1e-5, centred=True), torch.ones_like(x)
    with using(load_stack("mopexec-flat").on_kind("cpu" if way == "composed" else "cuda").kernels):
        for rows in (x, x.contiguous()):
            torch.testing.assert_close(norms.forward(rows, weights, "norm"), expected)
        norms.backward_(target, x, given, weights, grads, "norm")
    for one, other in zip((target - 1, *grads.values()), wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("counted", [12, 1])
def test_losses_of_routers_steer_and_are_not_told(counted: int) -> None:
    """Their gradient is that of the losses by their definition, a mean over all tokens, however many targets
    of a sequence count; and the loss is the cross entropy alone."""
    tokens = torch.arange(24).view(2, 12) % 37
    targets = tokens.clone()
    targets[:, counted:] = -100
    gradients, losses = [], []
    seen: list[torch.Tensor] = []
    for auxiliary in (Auxiliary(), Auxiliary(balance=0.5, z=0.3, tokens=24)):
        model = Transformer(spec(num_hidden_layers=2), torch.float64)
        fill(model, Seeded(0))
        model.set_auxiliary(auxiliary)
        model.layers[1].moe.router.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        loss = model.loss(tokens, targets, scale=1 / (2 * counted))
        router = model.layers[1].moe.router
        weight = router.weight
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, weight, retain_graph=True)[0])
    logits = F.linear(seen[0].detach(), weight)
    scores = logits.softmax(-1)
    chosen = F.one_hot(scores.topk(2).indices, 8).sum(1).double()
    share = chosen.view(2, 12, 8).sum(1) * 8 / 24
    balance = (scores.view(2, 12, 8).mean(1) * share).sum(1).mean()
    z = logits.logsumexp(-1).square().mean()
    (expected,) = torch.autograd.grad(0.5 * balance + 0.3 * z, weight)
    torch.testing.assert_close(gradients[1] - gradients[0], expected, rtol=1e-9, atol=1e-12)
    assert losses[0] == losses[1]
