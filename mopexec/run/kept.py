"""What a run keeps beside its checkpoints, so that it goes on and is exported as it began: the config of the
weights that it began with, and its tokenizer.
"""

import shutil
from pathlib import Path

from mopexec.data.tokenizer import CONFIG, TOKENIZER, complete_config
from mopexec.run.plans import KEPT, TRAINED
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


def began_with_weights(run: Path) -> bool:
    """Whether the run in this directory began with weights of Hugging Face's format."""
    return (run / KEPT / "config.json").is_file()


def tokenizer_of(run: Path) -> Path | None:
    """The tokenizer.json that the run in this directory has; None where it keeps none."""
    return next((path for path in (run / KEPT / TOKENIZER, run / TRAINED) if path.is_file()), None)


Chosen = tuple[str | None, str | None]
"""`tokenizer` and `trained` of DataOptions."""


def chosen(given: str | None, weights: Path | None, run: Path, *, resume: bool) -> Chosen:
    """The tokenizer that was given, else that of the weights; that of the run in `run` where it goes on.
    Raises MopError where another one than its own is given.
    """
    own = tokenizer_of(run) if resume else None
    if own is None:
        beside = weights and (weights / TOKENIZER).is_file()
        return given or (str(weights) if beside else None), None
    if given and not _same(Path(given), own):
        raise MopError(f"--tokenizer: {given} is not {own}, with which this run began")
    if own == run / TRAINED:
        return None, str(own)
    return given or str(own.parent), None


def _same(given: Path, own: Path) -> bool:
    """Whether both are one tokenizer; what cannot be read is refused where it is read."""
    given = given / TOKENIZER if given.is_dir() else given
    try:
        return given.read_bytes() == own.read_bytes()
    except OSError:
        return True


def keep_given(run: Path, weights: Path | None, tokenizer: str | None) -> None:
    """Copy the config of `weights`, and the tokenizer that was given or lies beside it, into the run's
    directory: aside, then renamed.
    """
    kept, aside = run / KEPT, run / f".{KEPT}"
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
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, path in files.items():
            if path.is_file():
                shutil.copyfile(path, aside / name)
        shutil.rmtree(kept, ignore_errors=True)
        aside.rename(kept)
    except OSError as error:
        raise MopError(f"{kept}: cannot be written: {error.strerror or error}") from None


def keep_trained(run: Path, tokens: Path) -> None:
    """Keep the tokenizer that was trained on the text of these tokens, if the run has none."""
    if tokenizer_of(run) is None and (tokens / TOKENIZER).is_file():
        io.write_text(run / TRAINED, (tokens / TOKENIZER).read_text(encoding="utf-8"))


def forget(run: Path) -> None:
    """Drop what an earlier run without a step kept here."""
    shutil.rmtree(run / KEPT, ignore_errors=True)
    (run / TRAINED).unlink(missing_ok=True)


def copy_into(folder: Path, run: Path) -> bool:
    """Config and tokenizer of the run in `run` as transformers reads them; whether there is a tokenizer."""
    kept, own = run / KEPT, tokenizer_of(run)
    trained = own == run / TRAINED
    if kept.is_dir():
        ignored = shutil.ignore_patterns(*TOKENIZER_FILES if trained else ())
        shutil.copytree(kept, folder, dirs_exist_ok=True, ignore=ignored)
    if trained:
        shutil.copyfile(run / TRAINED, folder / TOKENIZER)
    if own:
        complete_config(folder)
    return any((folder / name).is_file() for name in _VOCABULARIES)
