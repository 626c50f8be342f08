"""The commands of mopexec (commands.toml). torch is imported inside those that need it."""

from mopsim.common.interrupts import quiet_interrupts

quiet_interrupts("mopexec")  # before what takes long

from importlib import import_module  # noqa: E402
from typing import Any  # noqa: E402

from mopsim.common.app import App  # noqa: E402
from mopsim.common.command_line import run_app  # noqa: E402
from mopsim.common.commands import commands_of, register  # noqa: E402
from mopsim.common.errors import MopError  # noqa: E402
from mopsim.common.pairs import Pair, needs, paired  # noqa: E402

EXTRA = ("torch", "tokenizers", "pynvml", "safetensors")
"""Modules that the base install lacks: those of `mop[exec]`."""

app = App(
    name="mopexec",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train a plan for real, probe this machine, run one rank without hardware, verify a plan.",
)

PAIRS = {
    "train": paired(
        needs("--eval-data", "--eval-every", "--eval-batches"),
        needs("--checkpoint-every", "--checkpoint-async"),
    ),
    "reach": paired(
        Pair(("--data",), lambda given: given.get("--confirm", True), "has no use beside --no-confirm")
    ),
}


def run(command: str, given: dict[str, Any]) -> int | None:
    """Run mopexec.cli.COMMAND, which takes the options by name and returns the exit code."""
    code: int | None = import_module(f"mopexec.cli.{command}").run(**given)
    return code


for _name, _said in commands_of("mopexec.cli").items():
    register(app, _name, _said, run, PAIRS.get(_name))


def _run(arguments: list[str], standalone_mode: bool) -> Any:
    """The app; what only `mop[exec]` installs is named where it is missing. Raises MopError then."""
    try:
        return app(arguments, standalone_mode=standalone_mode)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA:
            raise
        raise MopError(f"{missing} is not installed, mopexec needs it: pip install 'mop[exec]'") from None


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    run_app(_run, "mopexec", arguments)
