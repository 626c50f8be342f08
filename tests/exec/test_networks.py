"""Each network equals its implementation in transformers: logits, loss, gradients of small random models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from msgspec.structs import replace

from mopexec.model import Transformer
from mopexec.model.auxiliary import Auxiliary
from mopexec.weights.files import Weights, read_config
from mopexec.weights.layout import Layout
from mopexec.weights.load import fill
from mopsim.spec.huggingface import from_config
from mopsim.spec.presets import load_model
from tests.exec import hf_models

pytestmark = pytest.mark.filterwarnings("default")


def ours(folder: Path) -> Transformer:
    """The single-device model of a Hugging Face directory."""
    spec = load_model(folder)
    model = Transformer(spec, torch.float32)
    fill(model, Weights(folder, Layout(spec, read_config(folder)["architectures"][0])))
    return model


def close(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    scale = max(expected.detach().abs().max().item(), 1e-6)
    error = (actual - expected).detach().abs().max().item() / scale
    assert error <= 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("family", hf_models.CONFIGS)
def test_equals_transformers(family: str, tmp_path: Path) -> None:
    theirs = hf_models.make(family)
    model = ours(hf_models.save(theirs, tmp_path / "weights"))
    tokens = hf_models.tokens()
    logits = theirs(input_ids=tokens[:, :-1]).logits
    close(model.head(model(tokens[:, :-1])), logits, "logits")

    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    expected.backward()
    loss = model.loss(tokens[:, :-1], tokens[:, 1:], scale=1 / (hf_models.SEQ * hf_models.BATCH))
    loss.backward()
    close(loss, expected, "loss")
    same_gradients(model, theirs, tmp_path)


def same_gradients(model: Transformer, theirs: Any, folder: Path) -> None:
    gradients = ours(hf_models.save(hf_models.with_gradients(theirs), folder / "gradients"))
    for name, parameter in gradients.named_parameters():
        actual = model.get_parameter(name).grad
        close(torch.zeros(()) if actual is None else actual, parameter.detach(), name)


LLAMA4 = {
    "embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "ffn": "feed_forward",
    "attention": "self_attn",
}  # fmt: skip


def test_layers_within_chunks_and_without_rotation_are_those_of_llama4() -> None:
    """Its text network without experts and without temperature, which mopexec does not have."""
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size_mlp=40, moe_layers=[], attn_temperature_tuning=False,
        use_qk_norm=False, attention_chunk_size=7, no_rope_layers=[1, 1, 0, 1], pad_token_id=None,
        attn_implementation="eager", rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    theirs, read = transformers.Llama4ForCausalLM(config), json.loads(config.to_json_string())
    spec = from_config({**read, "architectures": ["Llama4ForCausalLM"]}, "config.json")
    assert [spec.rotates(layer) for layer in range(4)] == [True, True, False, True]
    model = Transformer(replace(spec, expert_inputs_weighted=False), torch.float32)
    weights = dict(theirs.named_parameters())
    names = {name: _by_their_name(name) for name, _ in model.named_parameters()}
    model.load_state_dict({ours: weights[name] for ours, name in names.items()})
    tokens = hf_models.tokens()
    logits = theirs(input_ids=tokens[:, :-1]).logits
    close(model.head(model(tokens[:, :-1])), logits, "logits")
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    model.loss(tokens[:, :-1], tokens[:, 1:], scale=1 / (hf_models.SEQ * hf_models.BATCH)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        close(parameter.grad, weights[names[name]].grad, name)


def _by_their_name(name: str) -> str:
    parts = [LLAMA4.get(part, part) for part in name.split(".")]
    return ".".join(["model", *parts] if name.startswith("layers.") else parts)


def test_the_balance_loss_of_a_sequence_and_layer_is_that_of_transformers(tmp_path: Path) -> None:
    """Which counts a token once for each of its experts, and so has top_k times as much."""
    theirs = hf_models.make(
        "qwen3_moe", num_hidden_layers=2, output_router_logits=True, router_aux_loss_coef=0.5
    )
    model, tokens = ours(hf_models.save(theirs, tmp_path / "weights")), hf_models.tokens()[:1]
    found = theirs(input_ids=tokens[:, :-1])
    assert len(found.router_logits) == model.spec.num_moe_layers == 1
    plain = torch.nn.functional.cross_entropy(found.logits.flatten(0, 1), tokens[:, 1:].flatten())
    (plain + 0.5 * found.aux_loss).backward()
    model.set_auxiliary(Auxiliary(balance=0.5 * model.spec.num_experts_per_tok, tokens=hf_models.SEQ))
    model.loss(tokens[:, :-1], tokens[:, 1:], scale=1 / hf_models.SEQ).backward()
    same_gradients(model, theirs, tmp_path)
