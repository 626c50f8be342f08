"""Text in, tokens out: what is refused by name, and batches that no layout of the ranks changes."""

import msgspec
import numpy as np
import pytest
import torch

from mopexec.run import data
from mopexec.run.corpus import read_corpus
from mopexec.run.feed import Feed
from mopsim.common.errors import MopError, SpecError
from tests.exec.train_plans import small_plan

TEXT = "the quick brown fox jumps over the lazy dog, twice a day\n" * 400


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def dataset(text, tmp_path):
    return data.TokenDataset(data.prepare(str(text), 300, tmp_path / "cache"), seq_len=64, seed=1)


def test_tokens_give_back_the_text(text, tmp_path):
    from tokenizers import Tokenizer

    directory = data.prepare(str(text), 300, tmp_path / "cache")
    tokens = data.TokenDataset(directory, 8, 0).tokens
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.decode(tokens.tolist()) == TEXT
    assert tokens[-1] == tokenizer.token_to_id(data.END_OF_TEXT)
    assert int(tokens.max()) < 300


def test_a_text_is_tokenised_once_and_another_never_meets_it(text, tmp_path):
    cache = tmp_path / "cache"
    first = data.prepare(str(text), 300, cache)
    stamp = (first / "tokens.bin").stat().st_mtime_ns
    assert data.prepare(str(text), 300, cache) == first
    assert (first / "tokens.bin").stat().st_mtime_ns == stamp
    assert data.prepare(str(text), 301, cache) != first
    text.write_text(TEXT + "more")
    assert data.prepare(str(text), 300, cache) != first
    assert not list(cache.glob(".making*"))


def test_a_directory_is_read_by_name_without_hidden_files(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("b")
    (folder / "deep" / "a.txt").write_text("a")
    (folder / "empty.txt").write_text("")
    (folder / ".hidden").write_bytes(b"\xff\xfe")
    corpus = read_corpus(str(folder))
    assert [text for text, _ in corpus.pieces()] == ["b", "a"]


def test_the_text_that_ships_with_python_is_there():
    corpus = read_corpus("python")
    assert sum(path.stat().st_size for path in corpus.files) > 1_000_000
    assert corpus.files[0].name == "topics.py"


@pytest.mark.parametrize(
    ("content", "line"), [(b"", "is empty"), (b"\xff\xfe\x00", "is binary"), (b"text\0text", "is binary")]
)
def test_empty_and_binary_files_are_refused_by_name(tmp_path, content, line):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(MopError, match=line) as refusal:
        data.prepare(str(path), 300, tmp_path / "cache")
    assert str(path) in str(refusal.value)
    assert not (tmp_path / "cache").exists()


def test_missing_text_and_empty_directories_are_refused(tmp_path):
    with pytest.raises(MopError, match="no such file or directory"):
        read_corpus(str(tmp_path / "nowhere"))
    (tmp_path / "void").mkdir()
    with pytest.raises(MopError, match="empty directory"):
        read_corpus(str(tmp_path / "void"))


def test_a_vocabulary_below_the_bytes_and_a_short_text_are_refused(text, tmp_path):
    with pytest.raises(SpecError, match=r"plan\.model\.vocab_size: 256 is below 257"):
        data.prepare(str(text), 256, tmp_path)
    directory = data.prepare(str(text), 300, tmp_path)
    with pytest.raises(MopError, match="too few for one sequence"):
        data.TokenDataset(directory, 1_000_000, 0)


def test_a_cache_that_is_a_file_is_refused(text):
    with pytest.raises(MopError, match="--cache"):
        data.prepare(str(text), 300, text)


def test_targets_are_the_next_tokens_and_an_epoch_meets_every_window_once(dataset):
    tokens, targets = dataset.window(3)
    assert np.array_equal(tokens[1:], targets[:-1])
    windows = [dataset.window(i)[0].tobytes() for i in range(dataset.num_windows)]
    again = [dataset.window(i)[0].tobytes() for i in range(dataset.num_windows, 2 * dataset.num_windows)]
    assert sorted(windows) == sorted(again)
    assert windows != again


def test_every_layout_of_the_ranks_trains_on_the_same_tokens(dataset):
    whole = None
    for degree, micro_batch in ((1, 1), (2, 1), (4, 2), (1, 2), (2, 2)):
        plan = small_plan(world_size=4, global_batch=8)
        strategy = msgspec.structs.replace(
            plan.strategy,
            attention=msgspec.structs.replace(plan.strategy.attention, context_parallel=degree),
            micro_batch=micro_batch,
        )
        plan = msgspec.structs.replace(plan, strategy=strategy)
        parts = torch.zeros(8, 64, dtype=torch.int64)
        for rank in range(4):
            feed = Feed(plan, dataset, rank, torch.device("cpu"))
            for index, batch in enumerate(feed.batches(step=5)):
                first = (index * feed.data_groups + feed.group) * micro_batch
                parts[first : first + micro_batch, feed.start : feed.stop] = batch.tokens
        whole = parts if whole is None else whole
        assert torch.equal(whole, parts)
