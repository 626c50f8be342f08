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
from mopsim.spec.capability import model_refusals
from mopsim.spec.huggingface import from_config
from mopsim.strategies import fsdp2
from tests.exec import hf_models
from tests.exec.test_config_keys import PUBLISHED
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


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_when_they_are_read(value: float, tmp_path: Path) -> None:
    """By file, tensor and rule, where they are in the part that is read; else the rate is blamed later."""
    name = "model.layers.1.mlp.down_proj.weight"
    folder = hf_models.save(hf_models.make("llama"), tmp_path / "whole")

    def broken(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 0] = value

    bad = changed(folder, tmp_path / "bad", broken)
    weights = open_weights(bad, plan_of(bad, fsdp2(2)))
    model = Transformer(weights.layout.spec, torch.float32)
    rule = "holds values that are not finite: weights must be finite numbers"
    with pytest.raises(MopError, match=re.escape(f"{bad / 'model.safetensors'}: {name}: {rule}")):
        fill(model, weights)
    ours = "layers.1.ffn.down_proj.weight"
    shape = tuple(model.get_parameter(ours).shape)
    assert weights.read(ours, shape, None, 0, 4, shape[0]).isfinite().all()
    assert not weights.read(ours, shape, None, 0, 4, 4).numel()


def test_buffers_beside_the_weights_are_ignored_and_told(tmp_path: Path) -> None:
    """As transformers once wrote them with each layer."""
    folder = hf_models.save(hf_models.make("qwen2"), tmp_path / "whole")
    assert not open_weights(folder, plan_of(folder, fsdp2(2))).said_ignored()
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(3)]
    old = changed(folder, tmp_path / "old", lambda held: held.update({one: torch.ones(4) for one in names}))
    said = open_weights(old, plan_of(old, fsdp2(2))).said_ignored()
    assert said == f"--init-from: {old}: {names[0]} and 2 more: buffers, no weights: ignored"
    other = changed(folder, tmp_path / "other", lambda held: held.update({f"{names[0]}x": torch.ones(4)}))
    assert f"{names[0]}x: is no tensor of this Qwen2ForCausalLM" in refusal(other)


def test_every_architecture_that_is_read_and_run_has_its_weights() -> None:
    """Else a plan of such a folder says `mopexec train`, which cannot begin from it."""
    read = {name: from_config(PUBLISHED[name], "config.json") for name in ARCHITECTURES}
    assert set(FAMILIES) == {name for name, model in read.items() if not list(model_refusals(model))}
