"""Networks of the GPT kind equal their implementations in transformers: logits, loss, gradients of small
random models. Their weights have no table: they are laid out here."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from mopexec.model import Transformer
from mopsim.spec.model import ModelSpec
from tests.exec.test_networks import close

pytestmark = pytest.mark.filterwarnings("default")
VOCABULARY, HIDDEN, LAYERS, HEADS, INNER, SEQ = 61, 32, 3, 4, 48, 24
Named = dict[str, Tensor]
Layout = Callable[[Named], Iterator[tuple[str, Tensor]]]


def _both(theirs: Named, source: str, target: str) -> Iterator[tuple[str, Tensor]]:
    """A weight, and its bias where it has one."""
    for part in ("weight", "bias"):
        if f"{source}.{part}" in theirs:
            yield f"{target}.{part}", theirs[f"{source}.{part}"]


def _neox(theirs: Named) -> Iterator[tuple[str, Tensor]]:
    """Queries, keys and values of a head are beside each other."""
    yield "embedding.weight", theirs["gpt_neox.embed_in.weight"]
    yield "head.weight", theirs["lm_head.weight"]
    yield from _both(theirs, "gpt_neox.final_layer_norm", "final_norm")
    for i in range(LAYERS):
        block = {k.removeprefix(f"gpt_neox.layers.{i}."): v for k, v in theirs.items()}
        ours = f"layers.{i}."
        yield from _both(block, "input_layernorm", f"{ours}attention_norm")
        yield from _both(block, "post_attention_layernorm", f"{ours}ffn_norm")
        for part in ("weight", "bias"):
            joint = block[f"attention.query_key_value.{part}"]
            by_head = joint.view(HEADS, 3, HIDDEN // HEADS, *joint.shape[1:])
            for place, name in enumerate("qkv"):
                yield f"{ours}attention.{name}_proj.{part}", by_head[:, place].flatten(0, 1)
        yield from _both(block, "attention.dense", f"{ours}attention.o_proj")
        yield from _both(block, "mlp.dense_h_to_4h", f"{ours}ffn.up_proj")
        yield from _both(block, "mlp.dense_4h_to_h", f"{ours}ffn.down_proj")


def _nemotron(theirs: Named) -> Iterator[tuple[str, Tensor]]:
    yield "embedding.weight", theirs["model.embed_tokens.weight"]
    yield "head.weight", theirs["lm_head.weight"]
    yield from _both(theirs, "model.norm", "final_norm")
    for i in range(LAYERS):
        block, ours = f"model.layers.{i}.", f"layers.{i}."
        yield from _both(theirs, f"{block}input_layernorm", f"{ours}attention_norm")
        yield from _both(theirs, f"{block}post_attention_layernorm", f"{ours}ffn_norm")
        for name in "qkvo":
            yield from _both(theirs, f"{block}self_attn.{name}_proj", f"{ours}attention.{name}_proj")
        for name in ("up", "down"):
            yield from _both(theirs, f"{block}mlp.{name}_proj", f"{ours}ffn.{name}_proj")


def _spec(**fields: Any) -> ModelSpec:
    return ModelSpec(
        name="gpt", hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        head_dim=HIDDEN // HEADS, vocab_size=VOCABULARY, intermediate_size=INNER, ffn_matrices=2,
        norm="layernorm", rms_norm_eps=1e-5, **({"num_key_value_heads": HEADS} | fields),
    )  # fmt: skip


_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "intermediate_size": INNER, "attn_implementation": "eager",
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "max_position_embeddings": 64,
}  # fmt: skip
_BIASES: dict[str, Any] = {"attention_bias": "qkvo", "ffn_bias": True}


def _with_rotary(part: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": part}}


NETWORKS: dict[str, tuple[str, dict[str, Any], ModelSpec, Layout]] = {
    "GPT-NeoX": (
        "GPTNeoXForCausalLM",
        _SIZES | _with_rotary(0.5) | {"use_parallel_residual": False, "hidden_act": "gelu"},
        _spec(**_BIASES, partial_rotary_factor=0.5),
        _neox,
    ),
    "Nemotron": (
        "NemotronForCausalLM",
        _SIZES | _with_rotary(0.5) | {"num_key_value_heads": 2, "hidden_act": "relu2", "norm_eps": 1e-5},
        _spec(num_key_value_heads=2, partial_rotary_factor=0.5, ffn_activation="relu2"),
        _nemotron,
    ),
}  # fmt: skip


def _random(name: str, fields: dict[str, Any]) -> Any:
    """A model of which biases and norms are drawn too, so that a mistake in any shows."""
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**fields))
    with torch.no_grad():
        for one in model.parameters():
            vector = one.dim() == 1
            one.add_(0.1 * torch.randn(one.shape)) if vector else one.mul_(3)
    return model.train()


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_transformers(name: str) -> None:
    kind, fields, spec, layout = NETWORKS[name]
    theirs, ours = _random(kind, fields), Transformer(spec, torch.float32)
    given = dict(layout(dict(theirs.named_parameters())))
    if name == "Nemotron":  # whose norms have their weights less 1
        given = {key: one + 1 if key.endswith("norm.weight") else one for key, one in given.items()}
    parameters = dict(ours.named_parameters())
    assert given.keys() == parameters.keys()
    with torch.no_grad():
        for key, one in parameters.items():
            one.copy_(given[key])
    tokens = torch.randint(0, VOCABULARY, (2, SEQ + 1), generator=torch.Generator().manual_seed(2))
    logits = theirs(input_ids=tokens[:, :-1]).logits
    close(ours.head(ours(tokens[:, :-1])), logits, "logits")
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    expected.backward()
    loss = ours.loss(tokens[:, :-1], tokens[:, 1:], scale=1 / (2 * SEQ))
    loss.backward()
    close(loss, expected, "loss")
    wanted = dict(layout({key: one.grad for key, one in theirs.named_parameters()}))
    for key, one in parameters.items():
        close(one.grad, wanted[key], key)
