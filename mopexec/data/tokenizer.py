"""Tokenizers: a model's own from its files, or a byte-level BPE trained on the text."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopexec.data.chat import PLAIN, Chat
from mopsim.common import io
from mopsim.common.errors import MopError, SpecError, require, shown
from mopsim.common.json_text import read_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
"""Names of a tokenizer's files in a directory as models are published in."""
END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # 256 bytes and the end of text
_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|return|>", "<｜end▁of▁sentence｜>")
_TRAINING_CHARACTERS = 4 << 20  # what the BPE learns its merges from: enough, and bounded in time


@dataclass(frozen=True)
class GivenTokenizer:
    """A tokenizer.json, with what tokenizer_config.json beside it says; what it says of cutting and padding
    is of inference. end: text of the token that ends a document.
    """

    path: Path
    text: str
    end: str
    chat: Chat

    def load(self) -> "Tokenizer":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def read_tokenizer(given: str, vocab_size: int) -> GivenTokenizer:
    """The tokenizer in a file, or in a directory as models are published in. Raises MopError, and
    SpecError for one whose vocabulary is not the model's.
    """
    path = Path(given)
    path = path / TOKENIZER if path.is_dir() else path
    text, tokenizer = _load(path)
    if not tokenizer.get_vocab_size(with_added_tokens=False):
        raise MopError(f"--tokenizer: {path}: its vocabulary is empty")
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= vocab_size:
        raise SpecError(
            "--tokenizer", largest, f"is an id in {path}, beyond plan.model.vocab_size {vocab_size}"
        )
    beside, config = path.with_name(CONFIG), _config_beside(path) or {}
    specials = {
        name: _content(config, name, beside) for name in ("bos_token", "eos_token", "unk_token", "pad_token")
    }
    end = specials["eos_token"] or _known_end(tokenizer)
    if tokenizer.token_to_id(end) is None:
        raise MopError(
            f"--tokenizer: {path}: no token is known to end a text; name it as eos_token in {beside}"
        )
    template = _template(path.with_name("chat_template.jinja")) or _default(
        config.get("chat_template"), beside
    )
    return GivenTokenizer(path, text, end, Chat(template or PLAIN, tuple(specials.items())))


def digest(content: bytes) -> str:
    """SHA-256 of a tokenizer.json, however its lines end."""
    return hashlib.sha256(content.replace(b"\r\n", b"\n")).hexdigest()


def complete_config(path: Path, folder: Path) -> None:
    """tokenizer_config.json into `folder`, as it is beside the tokenizer.json at `path`, with what
    transformers' AutoTokenizer needs where it does not say it: the class that reads it, the token that ends a
    text, that decoding changes nothing. Raises MopError.
    """
    _, tokenizer = _load(path)
    found = _config_beside(path)
    config = {"clean_up_tokenization_spaces": False} if found is None else found
    needed = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if end := _known_end(tokenizer):
        needed["eos_token"] = end
    if missing := {name: value for name, value in needed.items() if not config.get(name)}:
        io.write_text(folder / CONFIG, json.dumps(config | missing, indent=2) + "\n")


def _load(path: Path) -> tuple[str, "Tokenizer"]:
    from tokenizers import Tokenizer

    try:
        text = path.read_text(encoding="utf-8")
        return text, Tokenizer.from_str(text)
    except OSError as error:
        raise MopError(f"--tokenizer: {path}: {error.strerror or error}") from None
    except Exception as error:  # the library raises Exception itself
        raise MopError(f"--tokenizer: {path}: is no tokenizer.json ({error})") from None


def _config_beside(path: Path) -> dict[str, Any] | None:
    """tokenizer_config.json beside the tokenizer.json at `path`; None where there is none."""
    beside = path.with_name(CONFIG)
    return read_object(beside, "--tokenizer") if beside.is_file() else None


def _known_end(tokenizer: "Tokenizer") -> str:
    """The token by which tokenizers are known to end a text; "" where there is none."""
    return next((token for token in _ENDS if tokenizer.token_to_id(token) is not None), "")


def check_trainable(vocab_size: int) -> None:
    """Refuse a vocabulary that no tokenizer can be trained for: below 257, or above the characters that it is
    trained from, for whose entries the trainer takes memory before it has one. Raises SpecError.
    """
    rule = ""
    if vocab_size < SMALLEST_VOCABULARY:
        rule = f"is below {SMALLEST_VOCABULARY}, the least for byte-level text"
    elif vocab_size > _TRAINING_CHARACTERS:
        rule = f"is above {_TRAINING_CHARACTERS}, the most a tokenizer is trained for; give --tokenizer"
    require(not rule, "plan.model.vocab_size", vocab_size, rule)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """A byte-level BPE of at most `vocab_size` tokens, from the first 4 Mi characters of `texts`. Raises
    as `check_trainable`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    check_trainable(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_first(texts), trainer)
    return tokenizer


def _first(texts: Iterable[str]) -> Iterable[str]:
    room = _TRAINING_CHARACTERS
    for text in texts:
        yield text[:room]
        room -= len(text)
        if room <= 0:
            return


def _template(path: Path) -> str:
    return io.read_text(path, "--tokenizer") if path.is_file() else ""


def _default(given: Any, where: Path) -> str:
    """The chat template, or the one of several that is called default; "" where there is none. Raises
    MopError.
    """
    if given is None:
        return ""
    if isinstance(given, list) and all(isinstance(one, dict) for one in given):
        given = {one.get("name"): one.get("template") for one in given}.get("default")
    if not isinstance(given, str):
        rule = "is neither a template nor a list of {name, template} with a default"
        raise MopError(f"--tokenizer: {where}: chat_template: {rule}")
    return given


def _content(config: dict[str, Any], name: str, where: Path) -> str:
    """A special token's text: written as such, or as an object with `content`; "" where there is none. Raises
    MopError.
    """
    token = config.get(name)
    text = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(text, str):
        rule = f"{shown(token)} is neither a token's text nor an object with it as content"
        raise MopError(f"--tokenizer: {where}: {name}: {rule}")
    return text or ""
