"""Each network equals its implementation in transformers: logits, loss, gradients of small random models."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mopexec.model import Transformer
from mopexec.model.auxiliary import Auxiliary
from mopexec.weights.files import Weights, read_config
from mopexec.weights.layout import Layout
from mopexec.weights.load import fill
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
        if model.spec.learned_positions and name.endswith("k_proj.bias"):  # it moves all scores alike
            assert actual is not None
            assert max(actual.abs().max(), parameter.abs().max()) < 1e-7  # rounding
            continue
        close(torch.zeros(()) if actual is None else actual, parameter.detach(), name)


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
