"""The commands of mopsim (commands/commands.toml). Its modules run them, each with its own heavy imports."""

from mopsim.common.interrupts import quiet_interrupts

quiet_interrupts("mopsim")  # before what takes long

from importlib import import_module  # noqa: E402
from typing import Any  # noqa: E402

from mopsim.commands import pairs  # noqa: E402
from mopsim.commands.options import simulations  # noqa: E402
from mopsim.common.app import App  # noqa: E402
from mopsim.common.command_line import run_app  # noqa: E402
from mopsim.common.commands import commands_of, register  # noqa: E402
from mopsim.spec.categories import FAMILIES  # noqa: E402
from mopsim.spec.figures import FIGURES  # noqa: E402

app = App(
    name="mopsim",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Simulate, compare and choose how to train a mixture-of-experts model on a cluster.",
)
profiles = App(no_args_is_help=True, help="Hardware profiles.")
app.add_typer(profiles, name="profile")

COMMANDS = commands_of(
    "mopsim.commands",
    {"families": ", ".join(FAMILIES), "typed": ",".join(FAMILIES)},
    {one.name.replace("-", "_"): {"optional": True, "help": f"{one.meaning}, {one.unit}"} for one in FIGURES},
)


def run(command: str, given: dict[str, Any]) -> int | None:
    """Run a module of mopsim.commands, or the loop, with the options by name; returns the exit code."""
    where = "mopsim.loop" if command == "demo" else f"mopsim.commands.{command}"
    code: int | None = import_module(where).run(**given)
    return code


for _name, _said in COMMANDS.items():
    _group, _, _own = _name.rpartition(" ")
    _app = profiles if _group else app
    register(_app, _own, _said, run, pairs.OF.get(_name), {"simulations": simulations})


def main() -> None:
    """Entry point."""
    run_app(app, "mopsim")


if __name__ == "__main__":
    main()
