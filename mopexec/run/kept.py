"""What a run keeps beside its checkpoints, so that it goes on and is exported as it began: the config of the
weights that it began with, and its tokenizer.
"""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from mopexec.data.prepare import naming
from mopexec.data.tokenizer import CONFIG, TOKENIZER, complete_config, digest
from mopexec.run.plans import ASIDE, KEPT, TRAINED, WRITING
from mopsim.common import io
from mopsim.common.errors import MopError

_BESIDE = (CONFIG, "chat_template.jinja")
"""What is read beside a tokenizer.json."""
TOKENIZER_FILES = (
    TOKENIZER, *_BESIDE, "tokenizer.model", "special_tokens_map.json", "vocab.json", "merges.txt",
    "added_tokens.json",
)  # fmt: skip
_VOCABULARIES = (TOKENIZER, "tokenizer.model", "vocab.json")
_CONFIGS = ("config.json", "generation_config.json")


def folder_of(run: Path) -> Path:
    """Where config and tokenizer lie: aside and whole, where the rename of both was interrupted."""
    kept, aside = run / KEPT, run / ASIDE
    return aside if aside.is_dir() and not kept.exists() else kept


def recover(run: Path) -> None:
    """Do the rename that was interrupted; another rank may be faster."""
    if folder_of(run) == run / ASIDE:
        with suppress(OSError):
            (run / ASIDE).rename(run / KEPT)


def began_with_weights(run: Path) -> bool:
    """Whether the run in this directory began with weights of Hugging Face's format."""
    return (folder_of(run) / "config.json").is_file()


def tokenizer_of(run: Path) -> Path | None:
    """The tokenizer.json that the run in this directory has; None where it keeps none."""
    return next((path for path in (folder_of(run) / TOKENIZER, run / TRAINED) if path.is_file()), None)


def chosen(given: str | None, weights: Path | None, run: Path, *, resume: bool) -> dict[str, Any]:
    """Fields of DataOptions: the tokenizer that was given, else that of the weights; that of the run in `run`
    where it goes on, made whole again where the one that is given is what the run began with. Raises MopError
    where that is another one.
    """
    if resume:
        recover(run)
    own = tokenizer_of(run) if resume else None
    if own is None:
        beside = weights and not given and (weights / TOKENIZER).is_file()
        return {"tokenizer": str(weights), "named_by": "--init-from"} if beside else _named(given)
    if given and (content := _content(Path(given), "--tokenizer")) != _content(own, "--resume"):
        if digest(content) != _began_with(run):
            raise MopError(f"--tokenizer: {given} is not {own}, with which this run began")
        io.write_text(own, content.decode())
    if own == run / TRAINED:
        return {"trained": str(own), "named_by": "--resume"}
    return _named(given) or {"tokenizer": str(own.parent), "named_by": "--resume"}


def _began_with(run: Path) -> str:
    """The digest of the run's tokenizer, as its newest checkpoint has it."""
    from mopexec.run.checkpoint import newest_state  # with torch's, another second to import

    found = newest_state(run)
    return found[1].tokenizer_digest if found else ""


def _named(given: str | None) -> dict[str, str]:
    return {"tokenizer": given} if given else {}


def _content(path: Path, option: str) -> bytes:
    path = path / TOKENIZER if path.is_dir() else path
    try:
        return path.read_bytes()
    except OSError as error:
        raise MopError(f"{option}: {path}: {error.strerror or error}") from None


def keep_given(run: Path, weights: Path | None, tokenizer: str | None) -> None:
    """Copy the config of `weights`, and the tokenizer that was given or lies beside it, into the run's
    directory: WRITING while it is written, ASIDE when it is whole, then KEPT, which is always whole.
    """
    recover(run)
    kept, aside, writing = run / KEPT, run / ASIDE, run / WRITING
    if weights is None and (tokenizer is None or (kept / TOKENIZER).is_file()):
        return
    configs = weights or kept
    files = {name: configs / name for name in _CONFIGS}
    source = Path(tokenizer or configs)
    if source.is_dir():
        files |= {name: source / name for name in TOKENIZER_FILES}
    else:
        files |= {TOKENIZER: source} | {name: source.with_name(name) for name in _BESIDE}
    try:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        for name, path in files.items():
            if path.is_file():
                shutil.copyfile(path, writing / name)
        shutil.rmtree(aside, ignore_errors=True)
        writing.rename(aside)
        if kept.exists():
            kept.rename(writing)
        aside.rename(kept)
        shutil.rmtree(writing, ignore_errors=True)
    except OSError as error:
        raise MopError(f"{kept}: cannot be written: {error.strerror or error}") from None


def keep_trained(run: Path, tokens: Path) -> None:
    """Keep the tokenizer that was trained on the text of these tokens, if the run has none."""
    if tokenizer_of(run) is None and (tokens / TOKENIZER).is_file():
        io.write_text(run / TRAINED, io.read_text(tokens / TOKENIZER, "--cache"))


def forget(run: Path) -> None:
    """Drop what an earlier run without a step kept here."""
    for name in (KEPT, ASIDE, WRITING):
        shutil.rmtree(run / name, ignore_errors=True)
    (run / TRAINED).unlink(missing_ok=True)


def copy_into(folder: Path, run: Path) -> bool:
    """Config and tokenizer of the run in `run` as transformers reads them; whether there is a tokenizer.
    Raises MopError."""
    kept, own = folder_of(run), tokenizer_of(run)
    trained = own == run / TRAINED
    for path in kept.iterdir() if kept.is_dir() else ():
        if path.is_file() and not (trained and path.name in TOKENIZER_FILES):
            shutil.copyfile(path, folder / path.name)
    if own:
        shutil.copyfile(own, folder / TOKENIZER)
        with naming("--run", "--tokenizer"):
            complete_config(own, folder)
    return any((folder / name).is_file() for name in _VOCABULARIES)
