"""Files that cannot be read as data: each is one line that names the file and the rule."""

import importlib
import os
import struct
from pathlib import Path

import pytest

from mopexec import data
from mopsim.common.errors import MopError
from tests.exec.test_data import TEXT, prepared, write_megatron

PREPARE = importlib.import_module("mopexec.data.prepare")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


NPY = b"\x93NUMPY\x01\x00"


def header(text):
    return NPY + struct.pack("<H", len(text)) + text.encode() + bytes(64)


@pytest.mark.parametrize(
    "content",
    [
        header("{'descr': '<i4', 'fortran_order': False, 'shape': (99999999999999999999,)}\n"),
        header("{'descr': '<i4', 'fortran_order': False, 'shape': (9223372036854775807,)}\n"),
        header("{'descr': '<i4', 'fortran_order': False, 'shape': (-3,)}\n"),
        header("{'descr': '<i4', 'fortran_order': False, 'shape': (3L,}\n"),
        header("{'descr': '<i4', 'fortran_order': False, 'shape': (\n"),
        header("(" * 5000),
        NPY + b"\xff",
    ],
    ids=["endless", "large", "negative", "python 2", "open", "nested", "short"],
)
def test_a_npy_file_with_a_broken_header_is_one_line(tmp_path, content, recwarn):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(MopError, match=r"a\.npy: is no(t one dimension| \.npy file) of"):
        prepared(tmp_path / "a.npy", 300, tmp_path / "cache")
    assert not recwarn


@pytest.mark.parametrize(
    ("sequences", "rule"), [([[], []], "a.bin: holds no token id"), ([[]], "a.bin: holds no token id")]
)
def test_a_megatron_file_without_a_token_is_refused(tmp_path, sequences, rule):
    with pytest.raises(MopError, match=rule):
        prepared(write_megatron(tmp_path / "a", sequences), 300, tmp_path / "cache")


@pytest.mark.parametrize("name", ["a.npy", "a.bin", "a.idx"])
def test_token_ids_in_a_directory_are_refused_by_name(tmp_path, name):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b.txt").write_text("text")
    (tmp_path / "data" / name).write_bytes(b"\0")
    with pytest.raises(MopError, match=f"{name} holds token ids: of a directory only text and records"):
        prepared(tmp_path / "data", 300, tmp_path / "cache")


def test_what_gives_its_bytes_once_is_refused(text, tmp_path):
    """A pipe's digest would name a cache of no tokens, which the file of the same bytes then met."""
    for name in ("pipe", "pipe.npy"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(MopError, match=rf"{name} is not a regular file, and it is read more than once"):
            prepared(tmp_path / name, 300, tmp_path / "cache")


def test_a_text_that_changes_while_it_is_read_is_not_cached(text, tmp_path, monkeypatch):
    train_tokenizer = PREPARE.train_tokenizer

    def slowly(texts, vocab_size):
        text.write_text(TEXT + "more")
        return train_tokenizer(texts, vocab_size)

    monkeypatch.setattr(PREPARE, "train_tokenizer", slowly)
    with pytest.raises(MopError, match=r"--data: .*text\.txt was changed while it was read"):
        prepared(text, 300, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_records_without_a_document_are_too_few(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(MopError, match="the text has 0 tokens, too few for one sequence"):
        data.TokenDataset(prepared(tmp_path / "a.jsonl", 300, tmp_path / "cache"), 8, 0)


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("chat_template.jinja", b"\xff", "chat_template.jinja: is not UTF-8 text"),
        ("tokenizer_config.json", b"[" * 100_000, "tokenizer_config.json: is not a JSON object"),
        ("tokenizer_config.json", b'{"eos_token": "\\ud83d"}', "tokenizer_config.json: is not a JSON object"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json: is not a JSON object"),
        ("tokenizer_config.json", b'{"a": {"b": NaN}}', "tokenizer_config.json: a.b: nan must be a finite"),
    ],
    ids=["bytes", "nested", "surrogate", "open", "no number"],
)
def test_a_damaged_file_beside_a_tokenizer_is_one_line(text, tmp_path, name, content, rule):
    made = prepared(text, 300, tmp_path / "cache")
    (made / name).write_bytes(content)
    with pytest.raises(MopError, match=f"--tokenizer: .*{rule}"):
        prepared(text, 300, tmp_path / "cache", tokenizer=str(made))


def test_without_a_home_directory_the_cache_must_be_given(tmp_path, monkeypatch):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert data.cache_directory(str(tmp_path)) == tmp_path
    with pytest.raises(MopError, match="--cache: must be given"):
        data.cache_directory(None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.cache_directory(None) == tmp_path / "mopexec"
