"""A Ctrl-C while a command is still being imported. Imports nothing that Python has not imported already."""

import sys


def quiet_interrupts(name: str) -> None:
    """For an entry module, before its slow imports: a Ctrl-C outside of `run_app` is one line too."""
    before = sys.excepthook

    def hook(kind, error, trace):  # type: ignore[no-untyped-def]  # their names would have to be imported
        if not issubclass(kind, KeyboardInterrupt):
            before(kind, error, trace)
            return
        import os
        import signal

        print(f"{name}: interrupted", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)

    sys.excepthook = hook
