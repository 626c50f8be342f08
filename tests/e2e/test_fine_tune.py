"""Fine-tuning as docs/fine-tune.md has it: weights and tokenizer of a published directory, JSON lines, MoP on
two ranks, killed, FSDP2 on four, and back to a directory that transformers loads with the same loss.
"""

import json
import random
import signal

import msgspec
import pytest
import torch
import transformers

import mopsim
from mopexec.data import TokenDataset
from mopexec.data.tokenizer import train_tokenizer
from mopsim.common import io
from tests.exec import hf_models
from tests.exec.forking import Program
from tests.exec.spawn import run_command
from tests.exec.train_runs import environment, finish, ranks_of, steps_done, wait_for

SEQ, BATCH, STEPS, SIZE = 64, 4, 6, 300
WORDS = [
    "the",
    "fox",
    "and",
    "a",
    "dog",
    "saw",
    "twelve",
    "red",
    "boats",
    "near",
    "an",
    "old",
    "mill",
    "before",
    "rain",
]


@pytest.fixture
def given(tmp_path):
    """A published directory made at random, and its texts."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=40)) for _ in range(400)]
    folder = hf_models.save(hf_models.make("qwen3_moe", vocab_size=SIZE), tmp_path / "model")
    train_tokenizer(texts, SIZE).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    for name, part in (("train", texts[:300]), ("held", texts[300:])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    return folder


def write_plan(path, folder, nodes, strategy):
    """A plan for the CPU profile, without bias balancing: Qwen3's weights have no place for it."""
    found = mopsim.simulate(
        str(folder / "config.json"),
        "cpu-2core",
        nodes=nodes,
        strategy=strategy,
        seq_len=SEQ,
        global_batch=BATCH,
    )
    found.save_plan(path)
    plain = io.read_yaml(path, "plan")
    plain.pop("prediction", None)
    path.write_text(msgspec.yaml.encode(plain).decode())


def start(out, *arguments):
    return Program(["mopexec.cli", *map(str, arguments)], environment(), out)


def test_fine_tuning_goes_from_weights_to_weights(given, tmp_path):
    mop = mopsim.mop(context_parallel=2, expert_parallel=2, vocab_parallel=2, dtype="float32")
    write_plan(tmp_path / "mop.yaml", given, 1, mop)
    write_plan(tmp_path / "fsdp2.yaml", given, 2, mopsim.fsdp2(expert_parallel=2, dtype="float32"))
    out = tmp_path / "run"
    texts = ["--data", tmp_path / "train.jsonl", "--eval-data", tmp_path / "held.jsonl", "--eval-batches", 1]
    begun = [
        "--init-from",
        given,
        "--set",
        "bias_update_rate=0",
        "--cache",
        tmp_path / "cache",
        "--checkpoint-every",
        2,
    ]
    shared = [*texts, *begun, "--out", out]
    first = start(out, "train", "--plan", tmp_path / "mop.yaml", "--steps", 1000, *shared)
    wait_for(lambda: steps_done(out) >= 3, first)
    first.send_signal(signal.SIGKILL)
    finish(first)
    wait_for(lambda: not ranks_of(out))
    steps = steps_done(out) + 3
    again = ["train", "--plan", tmp_path / "fsdp2.yaml", "--steps", steps, *shared, "--resume"]
    (tmp_path / "output").mkdir()
    code, _, err = run_command(list(map(str, again)), 4, tmp_path / "output")
    assert code == 0, err
    tuned = tmp_path / "tuned"
    code, _, err = finish(start(tuned, "export", "--run", out, "--to", "hf", "--out", tuned))
    assert code == 0, err

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert lines[-1]["loss"] < lines[0]["loss"]
    (held,) = {path.parent for path in (tmp_path / "cache").glob("tokens-*/meta.json")} - {
        first_tokens(tmp_path)
    }
    dataset = TokenDataset(held, SEQ, 0)
    tokens, targets = (torch.from_numpy(part) for part in dataset.batch(list(range(BATCH)), 0, SEQ))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    with torch.no_grad():
        logits = theirs(input_ids=tokens).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert lines[-1]["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert (tmp_path / "tuned" / "tokenizer.json").is_file()


def first_tokens(folder):
    """The larger one: what was trained on."""
    sizes = {path.parent: path.stat().st_size for path in (folder / "cache").glob("tokens-*/tokens0.bin")}
    return max(sizes, key=sizes.__getitem__)
