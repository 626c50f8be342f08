"""Starting the ranks: torchrun's own agent inside this process, and what became of them in one line."""

import json
import logging
import os
import shutil
import signal
import sys
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from mopexec.run import failures
from mopexec.run.environment import (
    CORES,
    LAUNCHER,
    ROUNDED,
    TORCHRUN,
    cpu_rank_environment,
    gpu_rank_environment,
    torch_knows_pinned,
)
from mopexec.run.options import TrainOptions
from mopexec.run.signals import one_stop
from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.common.outputs import say
from mopsim.common.processes import end_children


class RankError(Exception):
    """A rank ended on an error that is not the user's: one line that names it, exit code 1."""


def signal_code(name: str) -> int:
    """The exit code after the stop that `launch_ranks` returned: 128 + n, or 1 where it is ''."""
    return 128 + signal.Signals[name] if name else 1


def launch(options: TrainOptions, world_size: int, *, max_restarts: int = 0) -> str:
    """Train on `world_size` ranks of this machine; see `launch_ranks`."""
    return launch_ranks(
        "mopexec.run.worker",
        (json.dumps(io.to_plain(options)),),
        world_size,
        Path(options.out) / failures.LOGS,
        max_restarts=max_restarts,
        to_stderr=options.console == "stderr",
    )


def launch_ranks(
    module: str,
    arguments: tuple[str, ...],
    world_size: int,
    logs: Path,
    *,
    max_restarts: int = 0,
    to_stderr: bool = False,
) -> str:
    """Run `python -m module arguments` as each rank; returns the signal that stopped them, or ''.

    Raises MopError where a rank met a user's mistake, RankError where one failed or was killed. No rank is
    left. to_stderr: the first rank's standard error is the terminal's instead of its standard output.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    logs.mkdir(parents=True, exist_ok=True)
    failures.clear(logs)
    _set_environment(world_size)
    _silence_agent()
    config = _config(world_size, logs, max_restarts, to_stderr=to_stderr)
    try:
        with one_stop(lambda number: SignalException(f"got {number.name}", number)):
            elastic_launch(config, sys.executable)("-m", module, *arguments)
    except SignalException as error:
        end_children()  # ranks that the agent did not know yet
        return signal.Signals(error.sigval).name
    except ChildFailedError as error:
        raise _explain(error.failures, logs) from None
    return ""


def _config(world_size: int, logs: Path, max_restarts: int, *, to_stderr: bool) -> Any:
    """One node, rendezvous on a free port; output of all ranks but the first in files, its errors too."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    redirects = dict.fromkeys(range(world_size), Std.ALL)
    redirects[0] = Std.OUT if to_stderr else Std.ERR
    known: dict[str, Any] = {"signals_to_handle": "SIGQUIT", **_numa()}  # other signals are `one_stop`'s
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=uuid.uuid4().hex[:8],
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        monitor_interval=0.1,
        local_addr="localhost",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=redirects),
        **{name: value for name, value in known.items() if name in LaunchConfig.__dataclass_fields__},
    )


def _set_environment(world_size: int) -> None:
    """What ranks on a CPU start with, whose end is theirs, and time to end well after a signal."""
    os.environ[LAUNCHER] = str(os.getpid())
    defaults = dict(TORCHRUN)
    if _on_gpus():
        from mopexec.measure.probe_machine import usable_cores

        os.environ[CORES] = str(len(usable_cores()))
        if not torch_knows_pinned():
            say(f"mopexec: {ROUNDED}", stderr=True)
        for name, value in gpu_rank_environment().items():
            if os.environ.get(name):
                say(f"mopexec: ranks start with {name}={value}", stderr=True)
            os.environ[name] = value
    elif world_size > 1:
        defaults |= cpu_rank_environment()
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _on_gpus() -> bool:
    """Whether ranks have GPUs; asked without a context on one, which would hold memory there."""
    import torch

    return torch.cuda.is_available()


def _numa() -> dict[str, Any]:
    """Ranks run on the cores and the memory of their GPU's NUMA node, where torch finds it: by numactl."""
    if not _on_gpus():
        return {}
    if shutil.which("numactl") is None:
        say("mopexec: numactl is not installed: ranks are not bound to the cores near their GPU", stderr=True)
        return {}
    from torch.numa.binding import AffinityMode, NumaOptions

    return {"numa_options": NumaOptions(AffinityMode.NODE, should_fall_back_if_binding_fails=True)}


def _silence_agent() -> None:
    """No chatter of torchrun's agent on the user's terminal: what matters of it is said in one line."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _explain(found: dict[int, Any], logs: Path) -> Exception:
    """The first cause: a rank that a signal ended, else the earliest reported failure, else an exit code.

    A SIGTERM is the agent's own, to the ranks that were left.
    """
    killed = {rank: failure for rank, failure in found.items() if failure.exitcode < 0}
    for rank, failure in killed.items():
        if -failure.exitcode != signal.SIGTERM:
            name = str(-failure.exitcode)
            with suppress(ValueError):
                name = signal.Signals(-failure.exitcode).name
            hint = " (out of memory on this machine?)" if name == "SIGKILL" else ""
            return RankError(
                f"rank {rank} was ended by {name}{hint}; the other ranks were stopped; logs in {logs}"
            )
    reported = failures.first(logs)
    if reported is not None:
        line = failures.one_line(reported)
        return MopError(line) if reported.user_mistake else RankError(line)
    rank, failure = min(found.items(), key=lambda item: item[1].exitcode == -signal.SIGTERM)
    return RankError(f"rank {rank} ended with exit code {failure.exitcode}; logs in {logs}")
