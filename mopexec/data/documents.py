"""Documents of one file as pieces of text: plain text, JSON lines of texts or chats, columns of Parquet."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mopexec.data.chat import Chat, Interval
from mopsim.common.errors import MopError
from mopsim.common.json_text import KeyTwiceError, unique_keys

LossMask = Literal["auto", "all", "assistant"]
_PIECE_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class DocumentPiece:
    """Text of at most about 1 MiB, or one chat. counted: intervals of its characters that count in the loss,
    None = all of it; ends: its document ends, which is one character more for `counted`.
    """

    text: str
    counted: tuple[Interval, ...] | None = None
    ends: bool = False

    def counts(self, tokens: Sequence[Interval]) -> npt.NDArray[np.bool_]:
        """Whether a token, given by its characters, has one that counts; and the document's end, if it is."""
        size = len(self.text)
        places = np.array([*tokens, *([(size, size + 1)] * self.ends)], dtype=np.int64).reshape(-1, 2)
        if self.counted is None:
            return np.ones(len(places), dtype=np.bool_)
        inside = np.zeros(size + 1, dtype=np.int64)
        for start, stop in self.counted:
            inside[start:stop] = 1
        before = np.concatenate(([0], np.cumsum(inside)))
        starts, stops = (
            places[:, 0],
            np.maximum(places[:, 1], places[:, 0] + 1),
        )  # an empty one is of its place
        counted: npt.NDArray[np.bool_] = before[stops] > before[starts]
        return counted


@dataclass(frozen=True)
class DocumentReading:
    """How records become text. text_field: of a record with a text; loss_mask: which messages of a chat
    count ("auto" = those of the assistant). chat: how messages are written.
    """

    text_field: str
    loss_mask: LossMask
    chat: Chat

    def pieces(self, path: Path) -> Iterator[DocumentPiece]:
        """The file's documents. Raises MopError naming the file and the line or row."""
        return _READERS.get(path.suffix.lower(), _text)(path, self)

    def record(self, record: Any, where: str) -> Iterator[DocumentPiece]:
        """One record: a text under `text_field`, or a chat under `messages`."""
        if not isinstance(record, dict):
            raise MopError(f"--data: {where}: is not an object with {self.text_field!r} or 'messages'")
        if "messages" in record and self.text_field not in record:
            messages = record["messages"]
            whole, answers = self.chat.read(messages, where, answers=self.loss_mask != "all")
            yield DocumentPiece(_unicode(whole, where), answers, True)
            return
        text = record.get(self.text_field)
        if not isinstance(text, str):
            raise self.without_text(record, where)
        yield DocumentPiece(_unicode(text, where), () if self.loss_mask == "assistant" else None, True)

    def without_text(self, fields: Iterable[str], where: str) -> MopError:
        """What to raise for a record with these fields."""
        return MopError(
            f"--data: {where}: has no text in {self.text_field!r} and no 'messages'; it has "
            f"{', '.join(sorted(map(repr, fields))[:6]) or 'nothing'} (--text-field names another)"
        )


def _unicode(text: str, where: str) -> str:
    """Refuse the half of a character that JSON can write and UTF-8 cannot. Raises MopError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise MopError(f"--data: {where}: {half!r} is half of a character (a lone surrogate)") from None
    return text


def is_records(path: Path) -> bool:
    """Whether the file is read record by record."""
    return path.suffix.lower() in _READERS


def _text(path: Path, _reading: DocumentReading) -> Iterator[DocumentPiece]:
    """Pieces that end at a line's end."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = file.readlines(_PIECE_CHARACTERS)
        while lines:
            following = file.readlines(_PIECE_CHARACTERS)
            yield DocumentPiece("".join(lines), ends=not following)
            lines = following


def _json_lines(path: Path, reading: DocumentReading) -> Iterator[DocumentPiece]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line, object_pairs_hook=unique_keys)
            except KeyTwiceError as error:
                raise MopError(f"--data: {where}: {error}") from None
            except (ValueError, RecursionError):
                raise MopError(f"--data: {where}: is not a line of JSON") from None
            yield from reading.record(record, where)


def _parquet(path: Path, reading: DocumentReading) -> Iterator[DocumentPiece]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise MopError(
            f"--data: {path}: pyarrow is not installed, Parquet needs it: pip install pyarrow"
        ) from None
    done, unreadable = 0, (ArrowException, OSError, ValueError, OverflowError)
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            column = next((name for name in (reading.text_field, "messages") if name in names), None)
            if column is None:
                raise reading.without_text(names, str(path))
            for batch in file.iter_batches(columns=[column]):
                for value in batch.column(0):
                    yield from reading.record({column: value.as_py()}, f"{path}: row {done + 1}")
                    done += 1
    except unreadable as error:
        rows = f" after row {done}" if done else ""
        raise MopError(
            f"--data: {path}: is not a Parquet file that can be read{rows}: {_line(error)}"
        ) from None


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_READERS: dict[str, Callable[[Path, DocumentReading], Iterator[DocumentPiece]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
}
