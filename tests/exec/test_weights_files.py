"""Files of weights under other names than transformers writes, and those that say something wrong."""

import json
import re
from pathlib import Path

import msgspec
import pytest
import torch

from mopexec.cli import main
from mopexec.model import Transformer
from mopexec.weights.begin import open_weights
from mopexec.weights.families import FAMILIES
from mopexec.weights.files import read_config
from mopexec.weights.layout import Layout
from mopexec.weights.load import fill
from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.spec.architectures import ARCHITECTURES
from mopsim.spec.huggingface import from_config
from mopsim.strategies import fsdp2
from tests.exec import hf_models
from tests.exec.test_weights import changed, plan_of, refusal
from tests.spec.test_huggingface import GPT2


def test_weights_of_gpt2_without_its_head_are_read(tmp_path: Path) -> None:
    """As OpenAI's are published: names without `transformer.`, and each layer's mask beside them."""
    folder = hf_models.save(hf_models.make("gpt2"), tmp_path / "whole")

    def bare(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors |= {f"h.{layer}.attn.bias": torch.zeros(1, 1, 256, 256) for layer in range(3)}

    published = changed(folder, tmp_path / "bare", bare)
    found = [open_weights(one, plan_of(one, fsdp2(2))) for one in (folder, published)]
    models = [Transformer(weights.layout.spec, torch.float32) for weights in found]
    for model, weights in zip(models, found, strict=True):
        fill(model, weights)
    for name, value in models[0].named_parameters():
        assert torch.equal(value, models[1].get_parameter(name)), name
    lacking = changed(published, tmp_path / "lacking", lambda tensors: tensors.pop("h.1.ln_1.bias"))
    assert ": h.1.ln_1.bias: missing; layers.1.attention_norm.bias is read from it" in refusal(lacking)
    other = changed(
        published, tmp_path / "other", lambda tensors: tensors.update({"h.1.ln_1.bias": torch.zeros(5)})
    )
    assert ": h.1.ln_1.bias: shape [5] is not [32]" in refusal(other)


def test_parts_of_one_tensor_are_of_one_shape() -> None:
    spec = msgspec.structs.replace(from_config(GPT2, "config.json"), num_hidden_layers=1)
    layout = Layout(msgspec.structs.replace(spec, num_key_value_heads=5), "GPT2LMHeadModel")
    uneven = r"q_proj\.weight and .*k_proj\.weight have the shapes \[1600, 1600\] and \[320, 1600\]: GPT2LMH"
    with pytest.raises(MopError, match=uneven):
        layout.wanted()


@pytest.mark.parametrize("family", ["gpt2", "qwen3, one weight"])
def test_a_copy_that_differs_is_refused(family: str, tmp_path: Path) -> None:
    """transformers would train them apart (tie_weights in its modeling_utils)."""
    folder = hf_models.save(hf_models.make(family), tmp_path / "one")
    embedding = {"gpt2": "transformer.wte.weight"}.get(family, "model.embed_tokens.weight")

    def head(factor: float) -> Path:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            tensors["lm_head.weight"] = tensors[embedding] * factor

        return changed(folder, tmp_path / str(factor), change)

    equal, twice = head(1.0), head(2.0)
    open_weights(equal, plan_of(equal, fsdp2(2)))
    said = f"lm_head.weight: differs from {embedding}, which this network (config.json) has for both"
    assert refusal(twice) == f"{twice / 'model.safetensors'}: {said}"


def test_a_dtype_that_weights_have_not_is_refused_before_a_run_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = (
        hf_models.save(hf_models.make("llama", vocab_size=300), tmp_path / "given"),
        tmp_path / "run",
    )
    plan, text, config = tmp_path / "plan.yaml", tmp_path / "a.txt", read_config(folder)
    io.write_yaml(plan, plan_of(folder, fsdp2(1)))
    text.write_text("Text of a few words. " * 200)
    given = ["--init-from", str(folder), "--plan", str(plan), "--out", str(out), "--data", str(text)]
    (folder / "config.json").write_text(json.dumps(config | {"dtype": [1]}))
    with pytest.raises(SystemExit) as end:
        main(["train", *given, "--cache", str(tmp_path / "cache"), "--steps", "1"])
    assert end.value.code == 2
    assert "config.json: dtype: [1] must be one of bfloat16, float16" in capsys.readouterr().err
    assert not out.exists()
    for key, value, shown in (
        ("dtype", {"a": 1}, "{'a': 1}"),
        ("torch_dtype", "x", "'x'"),
        ("dtype", 1.5, "1.5"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(MopError, match=re.escape(f"config.json: {key}: {shown} must be one of bfloat16")):
            read_config(folder)


def test_every_architecture_that_is_read_has_its_weights() -> None:
    """Else a plan of such a folder says `mopexec train`, which cannot begin from it."""
    assert set(FAMILIES) == set(ARCHITECTURES)
