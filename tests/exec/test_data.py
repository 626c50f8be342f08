"""Text in, tokens out: what is refused by name, and batches that no layout of the ranks changes."""

import json
import struct

import msgspec
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from mopexec import data
from mopexec.data import DataOptions
from mopexec.data.chat import Chat
from mopexec.data.corpus import read_corpus
from mopexec.data.dataset import IGNORED
from mopexec.data.documents import DocumentReading
from mopexec.data.tokenizer import END_OF_TEXT
from mopexec.operators.documents import positions
from mopexec.run.feed import Feed
from mopsim.common.errors import MopError, SpecError
from tests.exec.train_plans import small_plan

TEXT = "the quick brown fox jumps over the lazy dog, twice a day\n" * 400


READING = DocumentReading("text", "auto", Chat())


def prepared(source, vocab_size, cache, **options):
    return data.prepare(DataOptions(source=str(source), **options), vocab_size, cache)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def dataset(text, tmp_path):
    return data.TokenDataset(prepared(text, 300, tmp_path / "cache"), seq_len=64, seed=1)


def test_tokens_give_back_the_text(text, tmp_path):

    directory = prepared(text, 300, tmp_path / "cache")
    tokens = data.TokenDataset(directory, 8, 0).parts[0].tokens
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.decode(tokens.tolist()) == TEXT
    assert tokens[-1] == tokenizer.token_to_id(END_OF_TEXT)
    assert int(tokens.max()) < 300


def test_a_text_is_tokenised_once_and_another_never_meets_it(text, tmp_path):
    cache = tmp_path / "cache"
    first = prepared(text, 300, cache)
    stamp = (first / "tokens0.bin").stat().st_mtime_ns
    assert prepared(text, 300, cache) == first
    assert (first / "tokens0.bin").stat().st_mtime_ns == stamp
    assert prepared(text, 301, cache) != first
    text.write_text(TEXT + "more")
    assert prepared(text, 300, cache) != first
    assert not list(cache.glob(".making*"))


def test_a_directory_is_read_by_name_without_hidden_files(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("b")
    (folder / "deep" / "a.txt").write_text("a")
    (folder / "empty.txt").write_text("")
    (folder / ".hidden").write_bytes(b"\xff\xfe")
    corpus = read_corpus(str(folder))
    assert [piece.text for piece in corpus.pieces(READING)] == ["b", "a"]


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
        prepared(path, 300, tmp_path / "cache")
    assert str(path) in str(refusal.value)
    assert not (tmp_path / "cache").exists()


def test_missing_text_and_empty_directories_are_refused(tmp_path):
    with pytest.raises(MopError, match="no such file or directory"):
        read_corpus(str(tmp_path / "nowhere"))
    (tmp_path / "void").mkdir()
    with pytest.raises(MopError, match="empty directory"):
        read_corpus(str(tmp_path / "void"))


def test_a_vocabulary_below_the_bytes_or_without_end_and_a_short_text_are_refused(text, tmp_path):
    """The trainer takes memory for every entry of a vocabulary, and aborts the process where it has none."""
    with pytest.raises(SpecError, match=r"plan\.model\.vocab_size: 256 is below 257"):
        prepared(text, 256, tmp_path)
    with pytest.raises(SpecError, match=r"plan\.model\.vocab_size: 8589934592 is above 4194304"):
        prepared(text, 1 << 33, tmp_path)
    directory = prepared(text, 300, tmp_path)
    with pytest.raises(MopError, match="too few for one sequence"):
        data.TokenDataset(directory, 1_000_000, 0)


def test_a_cache_that_is_a_file_is_refused(text):
    with pytest.raises(MopError, match="--cache"):
        prepared(text, 300, text)


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


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def decoded(directory, dataset):
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return tokenizer, tokenizer.decode(dataset.parts[0].tokens.tolist(), skip_special_tokens=False)


def test_json_lines_are_trained_on_as_their_texts(tmp_path):
    records = [{"text": f"story {i} of a fox", "id": i} for i in range(40)]
    directory = prepared(write_lines(tmp_path / "a.jsonl", records), 300, tmp_path / "cache")
    _, text = decoded(directory, data.TokenDataset(directory, 8, 0))
    assert text == "".join(record["text"] + END_OF_TEXT for record in records)


def test_only_the_assistants_messages_count(tmp_path):
    chat = [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}]
    path = write_lines(tmp_path / "chat.jsonl", [{"messages": chat}] * 30)
    directory = prepared(path, 300, tmp_path / "cache")
    dataset = data.TokenDataset(directory, 16, 0)
    _, targets = dataset.batch(list(range(dataset.num_windows)), 0, 16)
    tokenizer, _ = decoded(directory, dataset)
    counted = tokenizer.decode(targets[targets != IGNORED].tolist(), skip_special_tokens=False)
    assert set(counted.replace(" four\n" + END_OF_TEXT, "|")) <= set("| four\n" + END_OF_TEXT)
    assert counted.count(" four\n" + END_OF_TEXT) > 20
    assert "two" not in counted
    assert "assistant" not in counted
    assert dataset.num_targets(range(dataset.num_windows)) == (targets != IGNORED).sum() < targets.size
    everything = prepared(path, 300, tmp_path / "cache", loss_mask="all")
    assert not data.TokenDataset(everything, 16, 0).masked


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("{", "a.jsonl:2: is not a line of JSON"),
        ('{"body": "x"}', "a.jsonl:2: has no text in 'text' and no 'messages'; it has 'body'"),
        ("[1]", "a.jsonl:2: is not an object"),
        ('{"text": "a", "text": "b"}', "a.jsonl:2: the key 'text' is given twice"),
        ('{"messages": [{"role": "user"}]}', "a.jsonl:2: message 1: content: None is no text"),
        ('{"messages": []}', "a.jsonl:2: 'messages' is not a list of messages"),
        ('{"text": "a \\ud83d"}', r"a.jsonl:2: '\ud83d' is half of a character (a lone surrogate)"),
        ('{"messages": [{"role": "user", "content": "\\udc00"}]}', r"a.jsonl:2: '\udc00' is half of a char"),
    ],
)
def test_a_line_without_its_text_is_refused_by_its_number(tmp_path, line, rule):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(MopError) as refusal:
        prepared(path, 300, tmp_path / "cache")
    assert rule in str(refusal.value)


def test_a_parquet_file_gives_the_texts_of_its_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": ["one fox", "two foxes"] * 20}), tmp_path / "a.parquet")
    directory = prepared(tmp_path / "a.parquet", 300, tmp_path / "cache", text_field="body")
    assert decoded(directory, data.TokenDataset(directory, 8, 0))[1].startswith(f"one fox{END_OF_TEXT}two")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(MopError, match=r"b\.parquet: is not a Parquet file"):
        prepared(tmp_path / "b.parquet", 300, tmp_path / "cache")


def test_of_a_parquet_file_only_the_text_is_read_and_a_row_that_cannot_be_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    far = pyarrow.array([2**62, 2**62], pyarrow.timestamp("ms"))
    table = pyarrow.table({"text": ["a fox", "a dog"], "when": far, "body": pyarrow.array([b"a", b"\xff"])})
    table = table.set_column(2, "body", table["body"].combine_chunks().view(pyarrow.string()))
    parquet.write_table(table, tmp_path / "a.parquet")
    pieces = DocumentReading("text", "auto", Chat()).pieces(tmp_path / "a.parquet")
    assert [piece.text for piece in pieces] == ["a fox", "a dog"]
    for field, rule in (
        ("when", "a.parquet: is not a Parquet file that can be read: "),
        ("body", "a.parquet: is not a Parquet file that can be read after row 1: 'utf-8' codec"),
        ("title", "a.parquet: has no text in 'title' and no 'messages'; it has 'body', 'text', 'when'"),
    ):
        with pytest.raises(MopError, match=rule):
            list(DocumentReading(field, "auto", Chat()).pieces(tmp_path / "a.parquet"))


def write_megatron(stem, sequences):
    """An indexed dataset of int32 ids."""
    lengths = np.array([len(s) for s in sequences], dtype="<i4")
    places = (np.cumsum(lengths) - lengths).astype("<i8") * 4
    documents = np.arange(len(sequences) + 1, dtype="<i8")
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, len(sequences), len(documents))
    stem.with_suffix(".idx").write_bytes(head + lengths.tobytes() + places.tobytes() + documents.tobytes())
    stem.with_suffix(".bin").write_bytes(np.concatenate(sequences).astype("<i4").tobytes())
    return stem.with_suffix(".bin")


def test_megatrons_token_files_are_read_where_they_lie(tmp_path):
    ids = [np.arange(50) % 300, np.arange(30) % 7]
    path = write_megatron(tmp_path / "corpus", ids)
    dataset = data.TokenDataset(prepared(path, 300, tmp_path / "cache"), 8, 0)
    assert np.array_equal(dataset.parts[0].tokens, np.concatenate(ids))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(MopError, match=r"corpus\.bin: has 316 bytes, corpus\.idx says 320: it is cut short"):
        prepared(path, 300, tmp_path / "cache")
    path.with_suffix(".idx").write_bytes(b"MMIDIDX\x00\x00")
    with pytest.raises(MopError, match=r"corpus\.idx: is not an index"):
        prepared(path, 300, tmp_path / "cache")


@pytest.mark.parametrize("megatron", [False, True])
def test_documents_that_are_trained_apart_end_where_they_end(tmp_path, megatron):
    if megatron:
        path = write_megatron(tmp_path / "corpus", [np.arange(n) % 300 for n in (5, 8, 3, 40)])
    else:
        path = write_lines(tmp_path / "a.jsonl", [{"text": f"{n:b} fox {n}"} for n in range(9)])
    directory = prepared(path, 300, tmp_path / "cache")
    dataset, joined = (data.TokenDataset(directory, 8, 0, apart) for apart in (True, False))
    ends = dataset.parts[0].ends
    assert len(ends) == (4 if megatron else 9)
    indices = list(range(dataset.num_windows))
    starts = [dataset._start(index)[1] for index in indices]
    for index, start, documents in zip(indices, starts, dataset.documents(indices), strict=True):
        inside = ends[(ends > start) & (ends < start + 8)] - start
        assert documents == (*inside, 8)
        targets = dataset.window(index)[1]
        crossing = [end - start - 1 for end in ends if start < end <= start + 8]
        assert list(np.flatnonzero(targets == IGNORED)) == crossing
        expected = joined.window(index)[1].copy()
        expected[crossing] = IGNORED
        assert np.array_equal(targets, expected)
        assert positions((documents,), 2, 8, torch.device("cpu"))[0].tolist() == [
            place - max([0, *inside[inside <= place]]) for place in range(2, 8)
        ]
    assert joined.documents(indices) == ()
    counted = dataset.num_targets(range(dataset.num_windows))
    assert counted == 8 * dataset.num_windows - sum(ends <= 8 * dataset.num_windows)


def test_a_file_without_documents_and_a_damaged_cache(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(200))
    with pytest.raises(MopError, match=r"ids\.npy does not say where documents end, as .*attention_mask"):
        data.TokenDataset(prepared(tmp_path / "ids.npy", 300, tmp_path / "cache"), 8, 0, True)
    path = write_lines(tmp_path / "a.jsonl", [{"text": "one fox"}] * 30)
    for name in ("tokens0.bin", "ends0.bin", "meta.json"):
        made = prepared(path, 300, tmp_path / "cache") / name
        before = made.read_bytes()
        made.write_bytes(bytes([before[0] ^ 1]) + before[1:])
        assert (prepared(path, 300, tmp_path / "cache") / name).read_bytes() == before


def test_token_ids_beyond_the_vocabulary_are_refused_with_their_place(tmp_path):
    np.save(tmp_path / "ids.npy", np.array([1, 2, 300] * 20))
    with pytest.raises(SpecError, match=r"--data: 300 is token 2 of .*ids\.npy, outside plan\.model"):
        prepared(tmp_path / "ids.npy", 300, tmp_path / "cache")
    dataset = data.TokenDataset(prepared(tmp_path / "ids.npy", 301, tmp_path / "cache"), 8, 0)
    assert int(dataset.window(0)[0].max()) == 300
    (tmp_path / "short.npy").write_bytes((tmp_path / "ids.npy").read_bytes()[:200])
    with pytest.raises(MopError, match=r"short\.npy: is no \.npy file of token ids, or is cut short"):
        prepared(tmp_path / "short.npy", 301, tmp_path / "cache")


def test_a_given_tokenizer_is_used_and_one_of_another_vocabulary_refused(text, tmp_path):
    made = prepared(text, 300, tmp_path / "cache")
    again = prepared(text, 512, tmp_path / "cache", tokenizer=str(made))
    one, other = (data.TokenDataset(path, 8, 0).parts[0].tokens for path in (made, again))
    assert np.array_equal(one, other)
    with pytest.raises(SpecError, match=r"--tokenizer: 29. is an id in .*beyond plan\.model\.vocab_size 280"):
        prepared(text, 280, tmp_path / "cache", tokenizer=str(made))
    with pytest.raises(MopError, match=r"--tokenizer: .*nowhere"):
        prepared(text, 280, tmp_path / "cache", tokenizer=str(tmp_path / "nowhere"))


def test_a_mixture_gives_each_source_its_share(tmp_path):
    np.save(tmp_path / "a.npy", np.full(2000, 1))
    np.save(tmp_path / "b.npy", np.full(3000, 2))
    mixture = tmp_path / "mix.yaml"
    mixture.write_text("sources:\n- {path: a.npy, weight: 3}\n- {path: b.npy}\n")
    dataset = data.TokenDataset(prepared(mixture, 300, tmp_path / "cache"), 8, 0)
    firsts = [int(dataset.window(index)[0][0]) for index in range(2000)]
    assert firsts.count(1) == 1500
    assert abs(firsts[:100].count(1) - 75) <= 1
    mixture.write_text("sources:\n- {path: mix.yaml}\n")
    with pytest.raises(SpecError, match=r"data\.sources\[0\]\.path: 'mix\.yaml' is a mixture itself"):
        prepared(mixture, 300, tmp_path / "cache")
    mixture.write_text("sources:\n- {path: a.npy, weight: -3}\n")
    with pytest.raises(MopError, match=r"mix\.yaml: data\.sources\[0\]\.weight: -3\.0 must be above 0"):
        prepared(mixture, 300, tmp_path / "cache")


def test_a_damaged_cache_is_made_again(text, tmp_path):
    cache = tmp_path / "cache"
    directory = prepared(text, 300, cache)
    whole, tokenizer = ((directory / name).read_bytes() for name in ("tokens0.bin", "tokenizer.json"))
    for name, content in (
        ("tokens0.bin", whole[:-8]),
        ("tokens0.bin", b"x" + whole[1:]),
        ("meta.json", b"{"),
        ("tokenizer.json", b"\xff" + tokenizer[1:]),
        ("tokenizer.json", tokenizer.replace(b"e", b"a")),
    ):
        (directory / name).write_bytes(content)
        assert prepared(text, 300, cache) == directory
        assert (directory / "tokens0.bin").read_bytes() == whole
        assert (directory / "tokenizer.json").read_bytes() == tokenizer


def test_held_out_data_is_refused_under_its_own_name(text, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    held_out = DataOptions(source=str(tmp_path / "empty.txt"))
    with pytest.raises(MopError, match=r"--eval-data: .*empty\.txt is empty"):
        data.prepare_all(DataOptions(source=str(text)), held_out, 300, tmp_path / "cache")
