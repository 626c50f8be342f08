"""From what --data names to a directory of tokens: made once, aside, then renamed into the cache."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from mopexec.data.chat import Chat
from mopexec.data.corpus import PYTHON, Corpus, read_corpus, user_files
from mopexec.data.documents import DocumentPiece, DocumentReading, LossMask, is_records
from mopexec.data.source_order import ORDER
from mopexec.data.token_files import IdsContent, Stamp, TokenFile, open_token_file
from mopexec.data.tokenizer import END_OF_TEXT, TOKENIZER, GivenTokenizer, read_tokenizer, train_tokenizer
from mopsim.common import io
from mopsim.common.errors import MopError, require
from mopsim.common.io import Spec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

META = "meta.json"
_FORMAT = 5
_MIXTURES = (".yaml", ".yml")


class DataOptions(Spec, frozen=True, kw_only=True):
    """source: a file, a directory, "python", or a YAML mixture. tokenizer: a tokenizer.json or its directory;
    None = one trained on the text. trained: the tokenizer.json of that, where the run has it already.
    named_by: the option from which either is known.
    text_field, loss_mask: see `Reading`.
    """

    source: str = "python"
    tokenizer: str | None = None
    trained: str | None = None
    named_by: str = "--tokenizer"
    text_field: str = "text"
    loss_mask: LossMask = "auto"


class TextSource(Spec, frozen=True, kw_only=True):
    """One entry of a mixture: `weight` is its share of the sequences, relative to the others'."""

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.weight < float("inf"), "weight", self.weight, "must be above 0")


class Mixture(Spec, frozen=True, kw_only=True):
    """A YAML file of `sources`; paths are relative to the file."""

    sources: list[TextSource]

    def __post_init__(self) -> None:
        require(bool(self.sources), "sources", self.sources, "must name one source or more")


class TextPart(Spec, frozen=True, kw_only=True):
    """Token ids of one source. tokens: file, absolute or in the directory; mask: file of one byte a token,
    0 = does not count in the loss ("" = all count); ends: file of int64, tokens up to the end of each
    document ("" = not known). digest: SHA-256 of the ids' bytes; others: of the other files, by name.
    stamp: of a file that lies elsewhere, as it was read.
    """

    tokens: str
    dtype: str
    offset: int
    num_tokens: int
    weight: float
    digest: str
    mask: str = ""
    ends: str = ""
    others: dict[str, str] = msgspec.field(default_factory=dict)
    stamp: Stamp | None = None


class Meta(Spec, frozen=True, kw_only=True):
    """meta.json of a directory of tokens. digest: of the contents and of how they were read, not of where
    they lie."""

    vocab_size: int
    digest: str
    parts: list[TextPart]


@dataclass(frozen=True)
class _Text:
    corpus: Corpus
    weight: float


@dataclass(frozen=True)
class _Ids:
    file: TokenFile
    content: IdsContent
    stamp: Stamp
    weight: float


def cache_directory(given: str | None) -> Path:
    """Where tokenised text is kept: what the user gave, or mopexec's place in the XDG cache. Raises MopError
    where neither is known."""
    if given:
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mopexec"
    except RuntimeError:
        raise MopError("--cache: must be given: the user of this process has no home directory") from None


def prepare(options: DataOptions, vocab_size: int, cache: Path) -> Path:
    """The directory of the tokens of `options`, for a model of `vocab_size`: taken from the cache where it
    is whole, else made.

    Raises MopError for what cannot be read, with file and line or place, SpecError for a tokenizer or an id
    beyond the vocabulary.
    """
    with naming(options.named_by, "--tokenizer"):
        given = read_tokenizer(options.tokenizer, vocab_size) if options.tokenizer else None
        trained = read_tokenizer(options.trained, vocab_size) if options.trained and not given else None
    sources = [_open(source, vocab_size, cache) for source in _sources(options.source)]
    reading = DocumentReading(options.text_field, options.loss_mask, given.chat if given else Chat())
    digest = _digest(options, sources, given)
    final = cache / f"tokens-v{_FORMAT}-{digest}{_places(sources)}-{vocab_size}"
    if _is_whole(final):
        _check_trained(trained, final)
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=cache, prefix=".making-"))
    except OSError as error:
        raise MopError(f"--cache: {cache} cannot be written: {error.strerror or error}") from None
    try:
        parts = list(_parts(sources, reading, given or trained, vocab_size, aside))
        for source in sources:
            if isinstance(source, _Text):
                source.corpus.check_same()
        meta = Meta(vocab_size=vocab_size, digest=digest, parts=parts)
        (aside / META).write_text(json.dumps(io.to_plain(meta)))
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
    except OSError as error:
        if not _is_whole(final):  # else another run was faster, with the same content
            why = (
                error.strerror or f"the disk is full or a limit is reached ({error})"
            )  # numpy gives no reason
            raise MopError(f"--cache: {cache} cannot be written: {why}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def _check_trained(trained: GivenTokenizer | None, tokens: Path) -> None:
    """Refuse kept tokens of another tokenizer than the run has: of the same text another version trains
    another one."""
    beside = tokens / TOKENIZER
    if trained and beside.is_file() and io.read_text(beside, "--cache") != trained.text:
        raise MopError(
            f"--cache: {beside} is not {trained.path}, which the run began with; give another --cache"
        )


def prepare_all(
    training: DataOptions, evaluation: DataOptions | None, vocab_size: int, cache: Path
) -> tuple[Path, Path | None]:
    """(tokens to train on, tokens held out): both by the same tokenizer. Raises as `prepare`."""
    _check_records(training, evaluation)
    tokens = prepare(training, vocab_size, cache)
    if evaluation is None:
        return tokens, None
    own = tokens / TOKENIZER
    if evaluation.tokenizer is None and own.is_file():
        evaluation = msgspec.structs.replace(evaluation, tokenizer=str(own), named_by="--cache")
    with naming("--eval-data"):
        held_out = prepare(evaluation, vocab_size, cache)
    if evaluation.tokenizer is None and (held_out / TOKENIZER).is_file():
        raise MopError("--eval-data: is text, and --data is token ids: name their --tokenizer")
    return tokens, held_out


def _check_records(options: DataOptions, held_out: DataOptions | None) -> None:
    """Refuse what only records have where none is read. Raises MopError."""
    plain = DataOptions()
    for option, value, default in (
        ("--text-field", options.text_field, plain.text_field),
        ("--loss-mask", options.loss_mask if options.loss_mask == "assistant" else "", ""),
    ):
        if value != default and not any(map(_has_records, filter(None, (options, held_out)))):
            raise MopError(f"{option}: {value!r} has no use: no file of --data is JSON lines or Parquet")


def _has_records(options: DataOptions) -> bool:
    named = [source.path for source in _sources(options.source)]
    return any(is_records(path) for one in named if one != PYTHON for path in user_files(Path(one)))


@contextmanager
def naming(option: str, other: str = "--data") -> Iterator[None]:
    """Errors of the body name `option` as what was read, where they name `other`."""
    try:
        yield
    except MopError as error:
        if option == other:
            raise
        raise MopError(str(error).replace(f"{other}:", f"{option}:", 1)) from None


def read_meta(directory: Path) -> Meta:
    """Raises MopError for what is not a directory of tokens."""
    return io.load(directory / META, Meta, "tokens")


def _sources(source: str) -> list[TextSource]:
    path = Path(source)
    if path.suffix not in _MIXTURES:
        return [TextSource(path=source)]
    mixture = io.load(path, Mixture, "data")
    for number, one in enumerate(mixture.sources):
        rule = "is a mixture itself: name what it mixes"
        require(Path(one.path).suffix not in _MIXTURES, f"data.sources[{number}].path", one.path, rule)
    return [TextSource(path=str(path.parent / one.path), weight=one.weight) for one in mixture.sources]


def _open(source: TextSource, vocab_size: int, cache: Path) -> _Text | _Ids:
    file = open_token_file(Path(source.path))
    if file is None:
        return _Text(read_corpus(source.path), source.weight)
    stamp, content = file.stamp, file.content(cache)
    file.check(vocab_size, content)
    return _Ids(file, content, stamp, source.weight)


def _digest(options: DataOptions, sources: Sequence[_Text | _Ids], given: GivenTokenizer | None) -> str:
    contents = [
        (s.corpus.digest, s.weight)
        if isinstance(s, _Text)
        else (s.content.digest, s.weight, s.file.dtype, s.file.documents_digest)
        for s in sources
    ]
    tokenizer = [given.text, given.end, given.chat.template, given.chat.specials] if given else []
    order = [ORDER] if len(sources) > 1 else []
    return _short([contents, tokenizer, options.text_field, options.loss_mask, *order])


def _places(sources: Sequence[_Text | _Ids]) -> str:
    """Names where the files of ids lie, which a directory of tokens points to."""
    places = [(str(s.file.path), s.stamp) for s in sources if isinstance(s, _Ids)]
    return f"-{_short(places)}" if places else ""


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _is_whole(directory: Path) -> bool:
    """Whether every file of a directory in the cache is as it was written."""
    try:
        meta = read_meta(directory)
        return all(
            io.file_digest(directory / name) == digest
            for part in meta.parts
            for name, digest in {part.tokens: part.digest, **part.others}.items()
            if not Path(name).is_absolute()
        )
    except (MopError, OSError):
        return False


def _parts(
    sources: Sequence[_Text | _Ids],
    reading: DocumentReading,
    given: GivenTokenizer | None,
    vocab_size: int,
    directory: Path,
) -> Iterator[TextPart]:
    """Tokenise every text with one tokenizer, which is kept beside them, a file of each part of text."""
    texts = [source.corpus for source in sources if isinstance(source, _Text)]
    tokenizer, end = None, END_OF_TEXT
    if texts:
        everything = chain.from_iterable(corpus.pieces(reading) for corpus in texts)
        tokenizer = given.load() if given else train_tokenizer((p.text for p in everything), vocab_size)
        end = given.end if given else END_OF_TEXT
        text = given.text if given else tokenizer.to_str(pretty=True)
        (directory / TOKENIZER).write_text(text, encoding="utf-8")
    for number, source in enumerate(sources):
        if isinstance(source, _Ids):
            file = source.file
            yield TextPart(
                tokens=str(file.path), dtype=file.dtype, offset=file.offset, num_tokens=file.num_tokens,
                weight=source.weight, digest=source.content.digest, stamp=source.stamp,
                **_ends(file.ends, directory, number),
            )  # fmt: skip
        else:
            assert tokenizer is not None
            pieces = source.corpus.pieces(reading)
            part = _tokenise(pieces, tokenizer, end, vocab_size, directory, number, source.weight)
            part.others[TOKENIZER] = io.file_digest(directory / TOKENIZER)
            yield part


def _tokenise(
    pieces: Iterator[DocumentPiece],
    tokenizer: "Tokenizer",
    end: str,
    vocab_size: int,
    directory: Path,
    number: int,
    weight: float,
) -> TextPart:
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    end_id = tokenizer.token_to_id(end)
    tokens, mask = directory / f"tokens{number}.bin", directory / f"mask{number}.bin"
    num_tokens, masked, digest, ends = 0, False, hashlib.sha256(), list[int]()
    with tokens.open("wb") as ids_file, mask.open("wb") as mask_file:
        for batch in _batched(pieces, 16):
            encoded = tokenizer.encode_batch([piece.text for piece in batch], add_special_tokens=False)
            for found, piece in zip(encoded, batch, strict=True):
                ids = np.array(found.ids + [end_id] * piece.ends, dtype=dtype)
                ids.tofile(ids_file)
                counts = piece.counts(found.offsets)
                counts.astype(np.uint8).tofile(mask_file)
                digest.update(ids.tobytes())
                num_tokens, masked = num_tokens + len(ids), masked or not counts.all()
                if piece.ends:
                    ends.append(num_tokens)
    beside = _ends(np.array(ends, dtype=np.int64), directory, number)
    if masked:
        beside["mask"] = mask.name
        beside["others"][mask.name] = io.file_digest(mask)
    else:
        mask.unlink()
    return TextPart(
        tokens=tokens.name, dtype=dtype.str, offset=0, num_tokens=num_tokens, weight=weight,
        digest=digest.hexdigest(), **beside,
    )  # fmt: skip


def _ends(ends: npt.NDArray[np.int64] | None, directory: Path, number: int) -> dict[str, Any]:
    """The fields of a Part about its documents, whose ends are written into `directory`."""
    if ends is None:
        return {}
    file = directory / f"ends{number}.bin"
    ends.tofile(file)
    return {"ends": file.name, "others": {file.name: io.file_digest(file)}}


def _batched(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(items, size)):
        yield batch
