"""A run from scratch goes the whole way round: what it keeps, what it says of its export and its experts."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers
from msgspec.structs import replace

from mopexec import data
from mopexec.cli import main
from mopexec.data.prepare import DataOptions
from mopexec.data.tokenizer import train_tokenizer
from mopexec.run import kept
from mopexec.run.balance import fuller, starving
from mopsim.common import io
from mopsim.spec.plan import Plan, Prediction
from mopsim.spec.presets import load_model
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, mop
from tests.exec.spawn import run_command
from tests.plans import plan_of

pytestmark = pytest.mark.filterwarnings("default")

TEXT = "the model trains, and the fox sees twelve boats near an old mill\n" * 300
NETWORK = replace(load_model("tiny_qwen3_moe"), num_hidden_layers=1, hidden_size=64, vocab_size=300)
REFUSED = "note: mopexec export will refuse this run: "


def planned(**training: float) -> Plan:
    fields = {"seq_len": 64, "global_batch": 2} | training
    return plan_of(NETWORK, fsdp2(1, dtype="float32"), TrainSpec(**fields))  # type: ignore[arg-type]


class Runs:
    """Commands on one plan, text and cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        io.write_yaml(folder / "plan.yaml", planned())
        (folder / "text.txt").write_text(TEXT)
        (folder / "ranks").mkdir()

    def train(
        self, *arguments: str | int | Path, rate: float = 0.0, source: str = "text.txt"
    ) -> tuple[int, str, str]:
        names = {"--plan": "plan.yaml", "--data": source, "--cache": "cache", "--out": "run"}
        paths = [str(item) for name, path in names.items() for item in (name, self.folder / path)]
        setting = ["--set", f"bias_update_rate={rate}", "--profile-steps", "0"]
        return run_command(["train", *paths, *setting, *map(str, arguments)], 1, self.folder / "ranks")

    def export(self, capsys: pytest.CaptureFixture[str], code: int = 0) -> tuple[str, str]:
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["export", "--run", str(self.folder / "run"), "--to", "hf", "--out", str(out)])
        assert (ended.value.code or 0) == code
        said = capsys.readouterr()
        return said.out, said.err


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def decoded(folder: Path, text: str = "the model trains") -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return str(tokenizer.decode(tokenizer.encode(text)))


def test_what_was_trained_on_a_text_is_exported_with_its_tokenizer(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, error = runs.train("--steps", 2)
    assert code == 0, error
    assert REFUSED not in said
    said, error = runs.export(capsys)
    assert "Qwen3MoeForCausalLM: step 2" in said, error
    assert "without a tokenizer" not in said
    out = runs.folder / "out"
    assert decoded(out) == "the model trains"
    assert transformers.AutoTokenizer.from_pretrained(out).eos_token == "<|endoftext|>"
    transformers.AutoModelForCausalLM.from_pretrained(out)


def test_what_export_will_refuse_is_said_before_the_first_step(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, error = runs.train("--steps", 1, rate=0.001)
    assert code == 0, error
    (line,) = (line for line in said.splitlines() if REFUSED in line)
    assert "bias_update_rate: 0.001 must be 0: weights of Qwen3MoeForCausalLM have no place" in line
    assert "(--set bias_update_rate=0 from the first step)" in line
    assert said.index(REFUSED) < said.index("step:    1")
    code, said, error = runs.train("--steps", 2, "--resume")
    assert code == 0, error
    moved, advice = (
        "balance_bias: is not zero",
        "only a run with --set bias_update_rate=0 from its first step",
    )
    (line,) = (line for line in said.splitlines() if REFUSED in line)
    _, refusal = runs.export(capsys, code=2)
    for one in (line, refusal):
        assert moved in one
        assert advice in one
    code, said, _ = runs.train("--steps", 3, "--resume", "--routing", "profile", rate=0.001)
    assert moved in said, "which the checkpoint has, whatever moves it now"


def test_a_network_of_no_architecture_is_told_so(runs: Runs) -> None:
    plan = planned()
    strange = replace(plan, model=replace(plan.model, scoring_func="sigmoid"))
    io.write_yaml(runs.folder / "plan.yaml", strange)
    code, said, error = runs.train("--steps", 1)
    assert code == 0, error
    nearest = "the nearest, Qwen3MoeForCausalLM, would have scoring_func 'softmax', not 'sigmoid'"
    assert f"{REFUSED}model: tiny_qwen3_moe is no network of" in said
    assert nearest in said


def test_a_run_keeps_the_tokenizer_that_it_was_given(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, other = tmp_path / "mine.json", tmp_path / "other.json"
    train_tokenizer([TEXT], 290).save(str(given))
    train_tokenizer([TEXT[::-1]], 280).save(str(other))
    code, _, error = runs.train("--steps", 1, "--tokenizer", given)
    assert code == 0, error
    kept = runs.folder / "run" / "huggingface" / "tokenizer.json"
    assert kept.read_bytes() == given.read_bytes()
    given.unlink()
    code, said, error = runs.train("--steps", 2, "--resume")
    assert code == 0, error
    assert "going on after step 1" in said
    code, _, error = runs.train("--steps", 3, "--resume", "--tokenizer", other)
    assert (code, error) == (2, f"mopexec: --tokenizer: {other} is not {kept}, with which this run began\n")
    runs.export(capsys)
    assert decoded(runs.folder / "out") == "the model trains"


def test_a_run_goes_on_with_the_tokenizer_that_it_trained(runs: Runs, tmp_path: Path) -> None:
    code, _, error = runs.train("--steps", 1)
    assert code == 0, error
    kept = runs.folder / "run" / "tokenizer.json"
    (tokens,) = (runs.folder / "cache").glob("tokens-*")
    assert kept.read_bytes() == (tokens / "tokenizer.json").read_bytes()
    shutil.rmtree(runs.folder / "cache")
    code, said, error = runs.train("--steps", 2, "--resume", "--tokenizer", kept)
    assert code == 0, error
    assert "going on after step 1" in said
    assert kept.read_bytes() == (tokens / "tokenizer.json").read_bytes()
    was = io.file_digest(tokens / "tokenizer.json")
    train_tokenizer([TEXT[::-1]], 280).save(str(tokens / "tokenizer.json"))
    meta = (tokens / "meta.json").read_text()
    (tokens / "meta.json").write_text(meta.replace(was, io.file_digest(tokens / "tokenizer.json")))
    code, _, error = runs.train("--steps", 3, "--resume")
    rule = f"{tokens / 'tokenizer.json'} is not {kept}, which the run began with; give another --cache"
    assert code == 2
    assert f"--cache: {rule}\n" in error


def test_tokens_of_a_kept_tokenizer_are_its_own_under_the_same_name(tmp_path: Path) -> None:
    """Another version of the library may train another one; the data are the same to a checkpoint."""
    (tmp_path / "text.txt").write_text(TEXT)
    train_tokenizer([TEXT[::-1]], 280).save(str(tmp_path / "tokenizer.json"))
    options = DataOptions(source=str(tmp_path / "text.txt"))
    trained = data.prepare(options, 300, tmp_path / "one")
    kept = data.prepare(replace(options, trained=str(tmp_path / "tokenizer.json")), 300, tmp_path / "two")
    assert trained.name == kept.name
    assert (kept / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    sizes = [data.TokenDataset(found, 8, 0).num_tokens for found in (trained, kept)]
    assert sizes[0] != sizes[1]


def test_ids_alone_are_exported_without_a_tokenizer_which_is_said(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(runs.folder / "ids.npy", np.arange(4000) % 300)
    code, _, error = runs.train("--steps", 1, source="ids.npy")
    assert code == 0, error
    said, _ = runs.export(capsys)
    assert "without a tokenizer: the run keeps none; in" in said


LOADS = (3, 0, 1, 2, 2, 0, 0, 0)


def test_experts_that_starve_are_told_with_what_evens_loads(tmp_path: Path) -> None:
    said = starving(tmp_path, planned(bias_update_rate=0.0), LOADS)
    assert said.startswith("warning: 3 of 8 experts had under 1/8 of an even load in the last step; ")
    assert "--set bias_update_rate=0.001 (now 0, with which export refuses the run) or " in said
    assert said.endswith("--set router_aux_loss_coef=0.01 (now 0)")
    flat = plan_of(load_model("tiny"), mop(1, dtype="float32"), TrainSpec(seq_len=64, global_batch=2))
    said = starving(tmp_path, flat, LOADS)
    assert "--set bias_update_rate=0.002 (now 0.001) or " in said
    assert said.endswith("--set router_aux_loss_coef=0.01 (now 0)")


def test_what_cannot_be_set_higher_is_not_told(tmp_path: Path) -> None:
    said = starving(tmp_path, planned(router_aux_loss_coef=1000.0), LOADS)
    assert said.endswith("; to balance the loads: --set bias_update_rate=0.002 (now 0.001)")
    said = starving(tmp_path, planned(bias_update_rate=1.0, router_aux_loss_coef=1000.0), LOADS)
    assert said.endswith("had under 1/8 of an even load in the last step")


def test_what_train_refuses_is_not_advised(tmp_path: Path) -> None:
    """Weights of Qwen3's family have no place for the bias, so `train --init-from` refuses a rate."""
    kept.folder_of(tmp_path).mkdir()
    io.write_json(kept.folder_of(tmp_path) / "config.json", {"architectures": ["Qwen3MoeForCausalLM"]})
    said = starving(tmp_path, planned(bias_update_rate=0.0), LOADS)
    assert said.endswith("; to balance the loads: --set router_aux_loss_coef=0.01 (now 0)")


def test_loads_that_do_not_tell_are_not_told(tmp_path: Path) -> None:
    """None starves; no router chose; 64 tokens for 8 experts by 2 choices are a few routes each."""
    for loads in ((0, 3, *LOADS[2:]), ()):
        assert starving(tmp_path, planned(), loads) == ""
    assert starving(tmp_path, planned(seq_len=16), LOADS) == ""


def test_a_run_says_that_experts_starve(runs: Runs) -> None:
    """That of four steps at a high rate without balancing."""
    io.write_yaml(runs.folder / "plan.yaml", planned(learning_rate=0.1))
    code, said, error = runs.train("--steps", 4)
    assert code == 0, error
    loads = json.loads((runs.folder / "run" / "summary.json").read_text())["expert_loads"]
    assert sum(loads) == NETWORK.num_local_experts
    assert loads[0]
    assert f"warning: {loads[0]} of 8 experts had under 1/8 of an even load" in said.splitlines()[-1]


def test_a_peak_of_uneven_routing_is_told_with_what_plans_for_it() -> None:
    """The README's own fsdp2 run passed its interval: a fresh router sent 67 % of the routes to 4 of 8."""
    flat = planned()
    expected = Prediction(
        step_time=1.0, tokens_per_second=1.0, peak_memory=1000, host_memory=0, memory_by_category={},
        time_by_kind={},
    )  # fmt: skip
    plan = replace(flat, prediction=expected)
    said = fuller(plan, 1032, "67/4")
    assert "3.2% above" in said
    assert "--routing 67/4" in said
    assert "--any-routing" in said
    for peak, routing in ((1005, "67/4"), (1032, "balanced"), (1032, "1/4")):
        assert fuller(plan, peak, routing) == ""
    assert fuller(flat, 1032, "67/4") == ""
