"""What the cache of tokens is named after: a run never reads what another one kept of something else."""

import json
import os

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from mopexec import data
from mopexec.data import token_files
from mopsim.common.errors import MopError, SpecError
from tests.exec.test_data import prepared, write_lines, write_megatron

LONG_AGO = 1_600_000_000


def dataset_of(path, cache, apart=False, **options):
    return data.TokenDataset(prepared(path, 300, cache, **options), 8, 0, apart)


def test_a_file_of_ids_is_read_where_it_lies_now(tmp_path):
    """Its tokens were once kept for another path, which then got other contents."""
    first, second, cache = np.arange(200) % 50, np.arange(200) % 50 + 400, tmp_path / "cache"
    np.save(tmp_path / "tokens.npy", first)
    was = dataset_of(tmp_path / "tokens.npy", cache)
    np.save(tmp_path / "kept.npy", first)
    np.save(tmp_path / "tokens.npy", second)
    kept = dataset_of(tmp_path / "kept.npy", cache)
    assert np.array_equal(kept.parts[0].tokens, first)
    assert kept.text_digest == was.text_digest
    with pytest.raises(SpecError, match=r"--data: 400 is token 0 of .*tokens\.npy"):
        dataset_of(tmp_path / "tokens.npy", cache)
    (tmp_path / "tokens.npy").unlink()
    assert np.array_equal(dataset_of(tmp_path / "kept.npy", cache).parts[0].tokens, first)


def test_ids_that_change_after_they_were_read_are_refused(tmp_path):
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(200) % 50)
    directory = prepared(path, 300, tmp_path / "cache")
    np.save(path, np.arange(200) % 50 + 400)
    with pytest.raises(MopError, match=r"ids\.npy: was changed after it was read"):
        data.TokenDataset(directory, 8, 0)
    path.unlink()
    with pytest.raises(MopError, match=r"--data: .*ids\.npy: No such file"):
        data.TokenDataset(directory, 8, 0)


def test_another_index_or_dtype_of_the_same_bytes_is_another_reading(tmp_path):
    cache, ids = tmp_path / "cache", np.arange(120) % 300
    np.save(tmp_path / "same.npy", ids.astype("<i4"))
    digests = {dataset_of(tmp_path / "same.npy", cache).text_digest}
    for size in (20, 30):
        path = write_megatron(tmp_path / "corpus", [ids[at : at + size] for at in range(0, 120, size)])
        found = dataset_of(path, cache, apart=True)
        assert found.parts[0].ends.tolist() == list(range(size, 121, size))
        digests.add(found.text_digest)
    np.save(tmp_path / "same.npy", ids.astype("<i4").view("<u2"))
    digests.add(dataset_of(tmp_path / "same.npy", cache).text_digest)
    assert len(digests) == 4


def test_a_file_of_ids_is_read_once(tmp_path, monkeypatch):
    """A resume of a trillion tokens does not hash them again; a file that was written again is read again."""
    reads, path = [], tmp_path / "ids.npy"
    read = token_files.TokenFile._read
    monkeypatch.setattr(token_files.TokenFile, "_read", lambda file: reads.append(file.path) or read(file))
    np.save(path, np.arange(200) % 50)
    for _ in range(2):
        dataset_of(path, tmp_path / "cache")
    assert len(reads) == 2  # a file this young may be written again within its time of change
    monkeypatch.setattr(token_files, "_SETTLED", -1)
    for _ in range(3):
        dataset_of(path, tmp_path / "cache")
    assert len(reads) == 3
    with pytest.raises(SpecError, match=r"--data: 20 is token 20 of"):
        prepared(path, 20, tmp_path / "cache")
    assert len(reads) == 3
    np.save(path, np.arange(200) % 40)
    assert dataset_of(path, tmp_path / "cache").parts[0].tokens.max() == 39
    assert len(reads) == 4


def test_another_file_of_the_same_size_and_time_is_read(tmp_path, monkeypatch):
    """As tar, cp -p and rsync -t put it there: it passed for the one before, in digest and vocabulary."""
    monkeypatch.setattr(token_files, "_SETTLED", -1)
    path, found = tmp_path / "ids.npy", []
    for most in (50, 40):
        np.save(path, np.arange(200) % most)
        os.utime(path, (LONG_AGO, LONG_AGO))
        found.append(dataset_of(path, tmp_path / "cache").text_digest)
    assert found[0] != found[1]
    np.save(path, np.arange(200) + 200)
    os.utime(path, (LONG_AGO, LONG_AGO))
    with pytest.raises(SpecError, match=r"--data: 300 is token 100 of"):
        dataset_of(path, tmp_path / "cache")


def test_a_mixture_in_another_order_is_another_text(tmp_path, monkeypatch):
    """Of texts without --tokenizer the digest stayed: a resume repeated sequences without a word."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"what {name} says, over and over. " * 50)
    (tmp_path / "mix.yaml").write_text("sources:\n- {path: a.txt}\n- {path: b.txt}\n")

    def digest(name):
        return dataset_of(tmp_path / name, tmp_path / "cache").text_digest

    mixture, alone = digest("mix.yaml"), digest("a.txt")
    monkeypatch.setitem(data.prepare.__globals__, "ORDER", "another")
    assert digest("mix.yaml") != mixture
    assert digest("a.txt") == alone


CHATS = [[{"role": "user", "content": "two foxes"}, {"role": "assistant", "content": "four"}]] * 30
WORDS = ["<unk>", "<end>", "<bos>", "a", "fox", "two", "foxes", "four"]


@pytest.fixture
def tokenizer(tmp_path):
    """A function: the directory of a tokenizer of words, with these fields of its config."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()

    def write(change=lambda made: None, **config):
        change(made)
        made.save(str(folder / "tokenizer.json"))
        given = {"eos_token": "<end>"} | config
        (folder / "tokenizer_config.json").write_text(json.dumps(given))
        return folder

    return write


def test_special_tokens_that_a_template_uses_are_a_part_of_the_reading(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": chat} for chat in CHATS])
    template = "{{ bos_token }} {% for m in messages %}{{ m.content }} {% endfor %}"
    found = []
    for bos in ("", "<bos>"):
        folder = tokenizer(bos_token=bos, chat_template=template)
        found.append(dataset_of(path, tmp_path / "cache", tokenizer=str(folder)))
    assert [int(WORDS.index("<bos>") in one.parts[0].tokens) for one in found] == [0, 1]
    assert found[0].text_digest != found[1].text_digest


def test_a_tokenizer_that_cuts_and_pads_gives_all_of_the_text(tmp_path, tokenizer):
    def for_inference(made):
        made.enable_truncation(4)
        made.enable_padding(length=16)

    path = write_lines(tmp_path / "a.jsonl", [{"text": "a fox " * 10}] * 9)
    folder = tokenizer(for_inference)
    assert dataset_of(path, tmp_path / "cache", tokenizer=str(folder)).num_tokens == 9 * 21


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({"eos_token": 5}, "tokenizer_config.json: eos_token: 5 is neither a token's text nor an object"),
        ({"bos_token": {"text": "<bos>"}}, "bos_token: {'text': '<bos>'} is neither a token's text nor"),
        ({"chat_template": [{"name": "default"}]}, "chat_template: is neither a template nor a list of"),
        ({"chat_template": [{"name": "tools", "template": "x"}]}, "chat_template: is neither a template"),
    ],
)
def test_a_field_of_the_config_that_cannot_be_used_is_named(tmp_path, tokenizer, config, rule):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a fox"}] * 9)
    with pytest.raises(MopError) as refusal:
        prepared(path, 300, tmp_path / "cache", tokenizer=str(tokenizer(**config)))
    assert rule in str(refusal.value)


def test_an_empty_vocabulary_is_refused(tmp_path, tokenizer):
    folder = tokenizer()
    empty = Tokenizer(models.WordLevel({}, "<unk>"))
    empty.add_special_tokens(["<end>"])
    empty.save(str(folder / "tokenizer.json"))
    with pytest.raises(MopError, match=r"--tokenizer: .*tokenizer\.json: its vocabulary is empty"):
        prepared(write_lines(tmp_path / "a.jsonl", [{"text": "a fox"}]), 300, tmp_path, tokenizer=str(folder))


def test_a_full_disk_is_named_where_the_tokenizer_is_kept(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a fox"}] * 9)
    original = type(path).write_text

    def full(self, *given, **options):
        if self.name == "tokenizer.json":
            raise OSError(28, "No space left on device")
        return original(self, *given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(path), "write_text", full)
        with pytest.raises(MopError, match=r"--cache: .* cannot be written: No space left on device"):
            prepared(path, 300, tmp_path / "cache")
