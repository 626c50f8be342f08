"""Weights in Hugging Face's format: in, out, byte for byte; every tensor is accounted for."""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mopexec.cli import main
from mopexec.model import Transformer
from mopexec.model.auxiliary import Auxiliary
from mopexec.run.kept import keep_given
from mopexec.weights.begin import difference, open_weights
from mopexec.weights.config import to_config
from mopexec.weights.export import check_exportable, export
from mopexec.weights.files import INDEX, read_config
from mopexec.weights.load import fill
from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.spec.capability import model_refusals
from mopsim.spec.huggingface import from_config
from mopsim.spec.plan import Plan
from mopsim.spec.presets import list_models, load_model
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, mop
from tests import plans
from tests.exec import hf_models
from tests.exec.spawn import pool

pytestmark = pytest.mark.filterwarnings("default")


def plan_of(folder: Path, strategy: Strategy, **training: Any) -> Plan:
    """A plan for the network of a Hugging Face directory."""
    fields = {"seq_len": 24, "global_batch": 2, "bias_update_rate": 0.0, "learning_rate": 1e-3} | training
    return plans.plan_of(load_model(folder), strategy, TrainSpec(**fields))


def stored(folder: Path) -> dict[str, bytes]:
    """Type, shape and bytes of every tensor of a directory."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            found[name] = f"{tensor.dtype}{tuple(tensor.shape)}".encode() + content
    return found


def refusal(folder: Path) -> str:
    """The line that refuses a directory."""
    with pytest.raises(MopError) as error:
        open_weights(folder, plan_of(folder, fsdp2(2)))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE directory with an index and several files."""
    folder = tmp_path_factory.mktemp("qwen")
    hf_models.make("qwen3_moe").save_pretrained(folder, max_shard_size="40KB")
    assert (folder / INDEX).is_file()
    return folder


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint."""
    folder = tmp_path_factory.mktemp("begun")
    plan = plan_of(hf_models.save(hf_models.make("mixtral"), folder / "given"), RUNTIMES["flat_units"])
    pool(2).run("tests.exec.weights_worker", "begin_and_save", plan, None, folder / "run", hf_models.tokens())
    return folder / "run" / "trained"


def changed(folder: Path, to: Path, change: Any) -> Path:
    """A copy of a directory in one file, its tensors changed."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    change(tensors)
    to.mkdir()
    save_file(tensors, to / "model.safetensors")
    (to / "config.json").write_text((folder / "config.json").read_text())
    return to


def test_every_tensor_is_accounted_for(qwen: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    missing = changed(qwen, tmp_path / "missing", lambda tensors: tensors.pop(name))
    assert refusal(missing) == f"{missing}: {name}: missing; layers.1.moe.experts.up_proj is read from it"
    extra = changed(qwen, tmp_path / "extra", lambda tensors: tensors.update({"a.weight": torch.zeros(2)}))
    assert refusal(extra) == (
        f"{extra / 'model.safetensors'}: a.weight: is no tensor of this Qwen3MoeForCausalLM (config.json)"
    )
    other = changed(qwen, tmp_path / "shape", lambda tensors: tensors.update({name: torch.zeros(3, 4)}))
    assert refusal(other) == f"{other / 'model.safetensors'}: {name}: shape [3, 4] is not [20, 32]"
    integers = {name: torch.zeros(20, 32, dtype=torch.int8)}
    quantised = changed(qwen, tmp_path / "dtype", lambda tensors: tensors.update(integers))
    assert f"{name}: dtype I8: only BF16, F16, F32, F64 are read" in refusal(quantised)


def test_damaged_directories(qwen: Path, tmp_path: Path) -> None:
    config = json.loads((qwen / "config.json").read_text())
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text(json.dumps(config))
    assert "holds neither model.safetensors nor" in refusal(empty)
    (empty / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    assert "is not a safetensors file" in refusal(empty)
    for index in ('{"a": 5}', '{"a": null}', '{"a": "x", "b": 5}', "[]", "[" * 100_000):
        (empty / "model.safetensors.index.json").write_text(f'{{"weight_map": {index}}}')
        assert "index.json: weight_map: must map tensors to files" in refusal(empty)
    for name in ("gone.safetensors", "x" * 300, "x/" * 3000, ""):
        (empty / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
        assert refusal(empty).endswith("no such file")
    (empty / "config.json").write_text("[" * 100_000)
    with pytest.raises(MopError, match=r"config\.json: is not a JSON object"):
        read_config(empty)
    (empty / "config.json").write_text(json.dumps(config | {"attn_scale": float("nan")}))
    with pytest.raises(MopError, match=r"config\.json: attn_scale: nan must be a finite number"):
        read_config(empty)
    (empty / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    assert "quantization_config: quantised weights are not read" in refusal(empty)


def test_another_network_or_a_lost_bias_is_refused_by_the_field(qwen: Path) -> None:
    plan = plan_of(qwen, fsdp2(2))
    other = msgspec.structs.replace(plan, model=msgspec.structs.replace(plan.model, rope_theta=5.0))
    with pytest.raises(MopError, match=r"^plan\.model\.rope_theta: 5\.0 is not the 10000\.0 of --init-from"):
        open_weights(qwen, other)
    with pytest.raises(
        MopError, match=r"^plan\.training\.bias_update_rate: 0\.001 must be 0: weights of Qwen3"
    ):
        open_weights(qwen, plan_of(qwen, fsdp2(2), bias_update_rate=1e-3))


def test_a_run_of_weights_does_not_go_on_by_a_rule_that_they_cannot_hold(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    io.write_yaml(tmp_path / "plan.yaml", plan_of(qwen, fsdp2(1), bias_update_rate=1e-3))
    keep_given(tmp_path / "run", qwen, None)
    (tmp_path / "run" / "metrics.jsonl").touch()
    paths = ["--plan", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "run"), "--data", "python"]
    with pytest.raises(SystemExit) as end:
        main(["train", *paths, "--steps", "2", "--resume"])
    assert end.value.code == 2
    rule = "bias_update_rate: 0.001 must be 0: weights of Qwen3MoeForCausalLM have no place"
    assert rule in capsys.readouterr().err


def test_a_part_is_read_alone(qwen: Path) -> None:
    weights = open_weights(qwen, plan_of(qwen, fsdp2(2)))
    model = Transformer(weights.layout.spec, torch.float32)
    fill(model, weights)
    up = model.get_parameter("layers.2.moe.experts.up_proj").detach()
    part = weights.read("layers.2.moe.experts.up_proj", (32, 20), 5, 1, 7, 13)
    assert torch.equal(part, up[5][:, 7:13])
    q = model.get_parameter("layers.0.attention.q_proj.weight").detach()
    assert torch.equal(weights.read("layers.0.attention.q_proj.weight", (64, 32), None, 0, 3, 9), q[3:9])


TRAINED = [name for name in list_models() if not list(model_refusals(load_model(name)))]
KNOWN = [name for name in TRAINED if name != "tiny" and not name.startswith("mop_")]


@pytest.mark.parametrize("family", hf_models.CONFIGS)
def test_a_config_comes_back(family: str, tmp_path: Path) -> None:
    spec = load_model(hf_models.save(hf_models.make(family), tmp_path))
    assert difference(from_config(to_config(spec), "config.json"), spec) is None


@pytest.mark.parametrize("name", [name for name in KNOWN if "config.json" in load_model(name).source])
def test_presets_have_configs(name: str) -> None:
    spec = load_model(name)
    assert difference(from_config(to_config(spec), "config.json"), spec) is None


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("mop_120b", "MixtralForCausalLM, would have scoring_func 'softmax', not 'sigmoid'"),
        ("tiny", "Glm4MoeForCausalLM, would have topk_method 'noaux_tc', not 'greedy'"),
        (
            "mpt_125m",
            "GPT2LMHeadModel, would have attention_bias 'qkvo', not 'none'; ffn_bias True, not False",
        ),
    ],
)
def test_a_network_that_no_architecture_says_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(MopError, match=f"^model: {name} is no network of an .*; the nearest, {nearest}"):
        to_config(load_model(name))


def test_a_network_of_deepseek_v3_without_mtp_is_no_v2() -> None:
    """transformers' DeepSeek-V2 has a softmax router without a balance bias, whatever its config says."""
    assert to_config(load_model("kimi_k2"))["architectures"] == ["DeepseekV3ForCausalLM"]


RUNTIMES = {
    "fully_shard": fsdp2(2, expert_parallel=2, dtype="float32"),
    "fully_shard, tensors": fsdp2(2, tensor_parallel=2, dtype="float32"),
    "flat_units": mop(2, expert_parallel=2, vocab_parallel=2, dtype="float32"),
    "fully_shard, alone": fsdp2(1, dtype="float32"),
    "flat_units, alone": mop(1, dtype="float32"),
}


SPLIT = ("deepseek_v3", "gpt_oss")
ALL = (*SPLIT, "gpt2", "llama4")
"""Whose tensors are cut, stacked, woven or turned in ways of their own."""


def runs() -> list[tuple[str, str]]:
    """Families of ALL on two ranks under each runtime, and two under tensor parallelism; the others, which
    are cut as those of ALL are, on one rank of one of two runtimes."""
    whole = ("fully_shard", "flat_units")
    told = [(family, name) for family in ALL for name in whole] + [
        (family, "fully_shard, tensors") for family in SPLIT
    ]
    rest = [family for family in hf_models.CONFIGS if family not in ALL]
    return told + [(family, f"{whole[at % 2]}, alone") for at, family in enumerate(rest)]


def strategy_of(runtime: str, folder: Path) -> Strategy:
    """Experts over the ranks, where there are any."""
    strategy = RUNTIMES[runtime]
    if load_model(folder).num_moe_layers or strategy.world_size == 1:
        return strategy
    experts = msgspec.structs.replace(strategy.experts, expert_parallel=1, expert_fsdp=2)
    return msgspec.structs.replace(strategy, experts=experts)


@pytest.mark.parametrize(("family", "runtime"), runs())
def test_in_and_out(family: str, runtime: str, tmp_path: Path) -> None:
    """Read by ranks and written again, the files are the same to the byte; of families of ALL after two steps
    too, transformers has the loss that the runner tells.
    """
    folder = hf_models.save(hf_models.make(family), tmp_path / "given")
    plan = plan_of(folder, strategy_of(runtime, folder))
    tokens = hf_models.tokens()
    given = (plan, folder, tmp_path / "run", tokens, family in ALL)
    loss = pool(plan.strategy.world_size).run("tests.exec.weights_worker", "begin_and_save", *given)[0]
    written = tmp_path / "again"
    export(tmp_path / "run" / "begun", tmp_path / "again", file_bytes=30_000)
    assert (written / INDEX).is_file()
    assert stored(written) == stored(folder)
    if family in ALL:
        written = tmp_path / "out"
        export(tmp_path / "run" / "trained", written)
        assert stored(written) != stored(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(written, attn_implementation="eager")
    with torch.no_grad():
        logits = theirs(input_ids=tokens[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def drafting(files: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of layer 3 by their names in transformers' module, which stacks the experts (its own loader
    knows DeepSeek-V3's layer 61 only).
    """
    layer, block = "model.layers.3.", "layers.0.mtp_block."
    inner = {name.removeprefix(layer): value for name, value in files.items() if name.startswith(layer)}
    found = {f"{block}{name}": value for name, value in inner.items()}
    found |= {f"layers.0.{name}.weight": inner[f"{name}.weight"] for name in ("enorm", "hnorm", "eh_proj")}
    found["layers.0.post_norm.weight"] = inner["shared_head.norm.weight"]
    stacks = {
        part: torch.stack([inner[f"mlp.experts.{e}.{part}_proj.weight"] for e in range(8)])
        for part in ("gate", "up", "down")
    }
    found[f"{block}mlp.experts.gate_up_proj"] = torch.cat((stacks["gate"], stacks["up"]), dim=1)
    found[f"{block}mlp.experts.down_proj"] = stacks["down"]
    return found


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_mtp_modules_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """Written by a run, and read as the modules that transformers drafts tokens with."""
    from transformers.modeling_layers import MtpModel

    theirs = hf_models.make(family, num_mtp_layers=1)
    plan = plan_of(hf_models.save(theirs, tmp_path / "given"), RUNTIMES["fully_shard"])
    assert plan.model.num_nextn_predict_layers == 1
    tokens = hf_models.tokens()
    pool(2).run("tests.exec.weights_worker", "begin_and_save", plan, None, tmp_path / "run", tokens)
    export(tmp_path / "run" / "trained", tmp_path / "out")
    copies = stored(tmp_path / "out")
    assert copies["model.layers.3.embed_tokens.weight"] == copies["model.embed_tokens.weight"]

    main_model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    )
    modules = MtpModel(main_model, 1)
    modules.load_state_dict(drafting(load_file(tmp_path / "out" / "model.safetensors")), strict=False)
    inputs, following = tokens[:, :-1], tokens[:, 1:]
    with torch.no_grad():
        hidden = main_model.model(inputs).last_hidden_state
        places = torch.arange(inputs.shape[1])[None].expand(inputs.shape)
        expected = modules.forward_layer(0, hidden, places, None, input_ids=following)
    model = Transformer(plan.model, torch.float32)
    fill(model, open_weights(tmp_path / "out", plan))
    model.set_auxiliary(Auxiliary(mtp=0.3))
    words, ends = (torch.nn.functional.pad(ids, (0, 1), value=-100) for ids in (inputs, following))
    found = model.terms(words, ends, 0, 1.0)[1]
    torch.testing.assert_close(found.hidden, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.targets, ends[:, 1:])


def test_a_new_network_gets_a_config_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that began at random is exported as the architecture that says its network."""
    folder = hf_models.save(hf_models.make("mixtral"), tmp_path / "given")
    plan = plan_of(folder, RUNTIMES["flat_units"])
    tokens = hf_models.tokens()
    loss = pool(2).run("tests.exec.weights_worker", "begin_and_save", plan, None, tmp_path / "run", tokens)[0]
    found = export(tmp_path / "run" / "trained", tmp_path / "out")
    assert (found.architecture, found.dtype) == ("MixtralForCausalLM", "float32")
    assert Path(found.checkpoint).parent == tmp_path / "run" / "trained" / "checkpoints"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = theirs(input_ids=tokens[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss == pytest.approx(expected.item(), rel=1e-5)

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("mopexec.weights.export.save_file", full)
    with pytest.raises(MopError, match="again: cannot be written: No space left on device"):
        export(tmp_path / "run" / "trained", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_exports_that_would_lose_something_are_refused(tmp_path: Path) -> None:
    folder = hf_models.save(hf_models.make("mixtral"), tmp_path / "given")
    plan = plan_of(folder, RUNTIMES["fully_shard"], bias_update_rate=0.01)
    arguments = (plan, None, tmp_path / "run", hf_models.tokens())
    pool(2).run("tests.exec.weights_worker", "begin_and_save", *arguments)
    moved = r"balance_bias: is not zero in .*, and MixtralForCausalLM has no place .*: only a run with --set"
    with pytest.raises(MopError, match=moved):
        export(tmp_path / "run" / "trained", tmp_path / "out")
    with pytest.raises(MopError, match=moved):
        check_exportable(tmp_path / "run" / "trained", plan_of(folder, RUNTIMES["fully_shard"]))
    with pytest.raises(MopError, match=r"rate: 0\.01 must be 0: .*Mixtral.* from the first step\)"):
        check_exportable(tmp_path / "new", plan)
    check_exportable(tmp_path / "new", plan_of(folder, RUNTIMES["fully_shard"]))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    with pytest.raises(MopError, match=r"--out: .* is not empty"):
        export(tmp_path / "run" / "trained", folder)
    for path in (tmp_path / "run" / "begun" / "checkpoints").glob("step_*"):
        shutil.rmtree(path)
    with pytest.raises(MopError, match="has no checkpoint to export"):
        export(tmp_path / "run" / "begun", tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("run.json", "run.json: step: 9 is not that of the directory's name"),
        ("__0_0.distcp", "__0_0.distcp is not as it was written (its SHA-256 differs)"),
        (".metadata", ".metadata is missing"),
    ],
)
def test_a_damaged_newest_checkpoint_is_passed_over(
    file: str, why: str, tmp_path: Path, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(begun, run)
    (older,) = (run / "checkpoints").iterdir()
    newest = shutil.copytree(older, older.with_name("step_00000008"))
    state = json.loads((newest / "run.json").read_text()) | {"step": 8}
    (newest / "run.json").write_text(json.dumps(state))
    if file == "run.json":
        (newest / file).write_text(json.dumps(state | {"step": 9}))
    elif file == ".metadata":
        (newest / file).unlink()
    else:
        (newest / file).write_bytes(b"")
    with pytest.raises(SystemExit) as end:
        main(["export", "--run", str(run), "--out", str(out), "--json", str(tmp_path / "found.json")])
    assert end.value.code == 0
    line = f"checkpoint {newest}: {why}"
    assert capsys.readouterr().err == f"mopexec: {line}; the one before is written\n"
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["checkpoint"], found["passed"]) == (str(older), [line])
    shutil.rmtree(older)
    with pytest.raises(MopError, match="--run: the only checkpoint cannot be read") as refusal:
        export(run, tmp_path / "again")
    assert line in str(refusal.value)
