"""Weights in Hugging Face's format through the commands: train --init-from, --resume, export."""

import shutil
from pathlib import Path

import pytest
import transformers

from mopexec.cli import main
from mopexec.data.tokenizer import train_tokenizer
from mopexec.weights.source import Seeded, ToldSource
from mopsim.common import io
from mopsim.common.units import format_bytes
from mopsim.strategies import fsdp2
from tests.exec import hf_models
from tests.exec.forking import Program
from tests.exec.spawn import run_command
from tests.exec.test_weights import plan_of, stored
from tests.exec.train_runs import environment, finish

pytestmark = pytest.mark.filterwarnings("default")


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """train --init-from, then export: the config and a tokenizer file come along."""
    folder = hf_models.save(hf_models.make("llama", vocab_size=300), tmp_path / "given")
    (folder / "tokenizer_config.json").write_text("{}")
    io.write_yaml(tmp_path / "plan.yaml", plan_of(folder, fsdp2(1, dtype="float32")))
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten\n" * 400)
    command = [
        "mopexec.cli", "train", "--plan", str(tmp_path / "plan.yaml"), "--steps", "2",
        "--data", str(tmp_path / "text.txt"), "--cache", str(tmp_path / "cache"), "--profile-steps", "0",
        "--out", str(tmp_path / "run"), "--init-from",
    ]  # fmt: skip
    wrong = Program([*command, str(tmp_path)], environment(), tmp_path / "run")
    assert wrong.communicate()[1].count("\n") == 1
    assert wrong.returncode == 2
    assert not (tmp_path / "run" / "checkpoints").exists()
    code, said, error = finish(Program([*command, str(folder)], environment(), tmp_path / "run"))
    assert code == 0, error
    assert f"reading weights: {folder} (" in said
    with pytest.raises(SystemExit) as end:
        main(["export", "--run", str(tmp_path / "run"), "--to", "hf", "--out", str(tmp_path / "out")])
    assert end.value.code in (0, None)
    assert "LlamaForCausalLM: step 2" in capsys.readouterr().out
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()
    assert stored(tmp_path / "out").keys() == stored(folder).keys()
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_run_goes_on_with_the_tokenizer_of_its_weights(tmp_path: Path) -> None:
    folder = hf_models.save(hf_models.make("llama", vocab_size=300), tmp_path / "given")
    train_tokenizer(["one two three four"] * 9, 290).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    io.write_yaml(tmp_path / "plan.yaml", plan_of(folder, fsdp2(1, dtype="float32")))
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten\n" * 400)
    names = {"--plan": "plan.yaml", "--data": "text.txt", "--cache": "cache", "--out": "run"}
    paths = [str(item) for name, path in names.items() for item in (name, tmp_path / path)]
    tmp_path.joinpath("ranks").mkdir()

    def train(*arguments: str) -> tuple[int, str, str]:
        return run_command(["train", *paths, "--profile-steps", "0", *arguments], 1, tmp_path / "ranks")

    code, _, error = train("--steps", "1", "--init-from", str(folder))
    assert code == 0, error
    code, said, error = train("--steps", "2", "--resume")
    assert code == 0, error
    assert "going on after step 1" in said
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    code, _, error = train("--steps", "2", "--resume")
    rule = f"--init-from: is needed: {tmp_path / 'run'} began with weights, and has no checkpoint yet"
    assert (code, error) == (2, f"mopexec: {rule}\n")


def test_how_much_of_the_weights_is_read_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    source = ToldSource(Seeded(0), said.append)
    source.read("norm.weight", (4, 2), None, 0, 1, 3)
    assert said == []
    monkeypatch.setattr("mopexec.weights.source.TELL_EVERY", 0.0)
    source.read("head.weight", (1024, 1024), None, 0, 0, 512)
    assert said == [f"reading weights: {format_bytes(4 * (4 + 512 * 1024))} by rank 0, now head.weight"]
