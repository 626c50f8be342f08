"""How a command ends, for both packages: a user's mistake is one line on standard error and exit code 2."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from mopsim.spec.errors import MopError


def run_app(app: Callable[..., Any], name: str, arguments: list[str] | None = None) -> NoReturn:
    """Run a typer app and exit: 0 or the command's code, 2 on a user's mistake, 130 where interrupted."""
    try:
        code = app(arguments, standalone_mode=False)
    except MopError as error:
        _fail(name, str(error))
    except KeyboardInterrupt:
        _fail(name, "interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        if type(error).__name__ == "Abort":
            _fail(name, "interrupted", 130)
        if not hasattr(error, "format_message"):  # typer's own errors have it; anything else is a bug
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            sys.exit(2)
        _fail(name, error.format_message())
    sys.exit(code if isinstance(code, int) else 0)


def _fail(name: str, message: str, code: int = 2) -> NoReturn:
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
