"""Each network equals its implementation in transformers: logits, loss, gradients of small random models."""

from pathlib import Path

import pytest
import torch

from mopexec.model import Transformer
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
    gradients = ours(hf_models.save(hf_models.with_gradients(theirs), tmp_path / "gradients"))
    for name, parameter in gradients.named_parameters():
        actual = model.get_parameter(name).grad
        close(torch.zeros(()) if actual is None else actual, parameter.detach(), name)
