"""Worker pools for tests: W processes that have joined one process group and run functions by name, again and
again.

Importing torch costs more than most cases, so a pool is made once per world size and test process and reused.
"""

import atexit
import contextlib
import gc
import importlib
import multiprocessing
import multiprocessing.connection
import os
import random
import socket
import sys
import tempfile
import traceback
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from mopsim.common.processes import end_with_parent
from tests.patience import HANG


def _serve(rank: int, world: int, store: str, cuda: bool, prompt: bool, connection: Any) -> None:
    end_with_parent(0)  # a rank that waits for others would hold its card for ever
    if not cuda:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.update(
        {"OMP_NUM_THREADS": "1", "LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world)}
    )
    import torch
    import torch.distributed as dist

    from mopexec.distributed.tiers import Platform
    from mopexec.run.job import begin_group

    torch.set_num_threads(1)
    if not cuda and not prompt:
        loops_give_way()
    platform = Platform.detect()
    begin_group(platform, dist.FileStore(store, world), rank, world)
    gc.freeze()  # what was imported: a collection looks at what tasks leave
    connection.send((True, None))
    while (task := connection.recv()) is not None:
        module, function, arguments = task
        try:
            connection.send((True, getattr(importlib.import_module(module), function)(platform, *arguments)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
        end_groups()
    dist.destroy_process_group()


def end_groups() -> None:
    """End the process groups that a task, or a case of one, made. gloo polls each in threads of its own: each
    of four ranks took 0.07 of a core with those of sixteen tasks while it waited."""
    import torch.distributed as dist
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()  # keeps meshes, and so groups, of earlier tasks
    gc.collect()
    world = dist.group.WORLD
    state: Any = dist.distributed_c10d._world
    for group in list(state.pg_map):
        if group is not world:
            dist.destroy_process_group(group)
            state.pg_names[object()] = ""  # split groups are named by how many there are: no name twice


def loops_give_way() -> None:
    """Threads in which gloo reads what other ranks send run where nothing else does, in groups made from now
    on. One that finds its pair's lock taken asks epoll again without a pause, and where ranks share cores the
    thread that has the lock waits for a core meanwhile: a quarter of what four ranks took was that. What was
    sent they hold for longer."""
    import torch.distributed as dist

    if not sys.platform.startswith("linux"):
        return
    state: Any = dist.distributed_c10d
    make = state._new_process_group_helper

    def made(*given: Any, **named: Any) -> Any:
        found = make(*given, **named)
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError), open(f"/proc/self/task/{thread}/comm") as name:
                if name.read().strip() == "gloo_tcp_loop":
                    os.setpriority(os.PRIO_PROCESS, int(thread), 19)
        return found

    state._new_process_group_helper = made
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # a thread that wakes takes no other's core


IMPORTED = (
    "torch.distributed.checkpoint",
    "torch.distributed.run",
    "torch.distributed.fsdp",
    "torch._subclasses.fake_tensor",
    "torch._dynamo",
    "fsspec",
    "pydantic",
    "tokenizers",
    "typer._adapters",
    "typer.main",
    "mopexec.modules.fully_shard",
    "mopexec.modules.split_modules",
    "mopexec.measure.probe_ranks",
    "mopexec.run.apply",
    "mopexec.run.train",
    "mopexec.run.worker",
    "tests.exec.fake_runner",
    "tests.exec.flat_parity",
)
"""What takes a rank seconds to import: ranks on the CPU are forked from a process that has done so."""


def fork_server() -> ForkServerContext:
    """What forks processes of this test process from one that has imported all of IMPORTED."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.exec.preloaded"])
    return context


class Pool:
    """`world` ranks over gloo on the CPU, or over nccl with a GPU each. Not thread-safe. prompt: threads
    of gloo do not give way, as memory is asked for to the byte."""

    def __init__(self, world: int, *, cuda: bool = False, prompt: bool = False) -> None:
        self.world, self.ended = world, False
        context: Any = multiprocessing.get_context("spawn") if cuda else fork_server()
        self._store = tempfile.mktemp(prefix="mop_store_")
        self._pipes, self._processes = [], []
        for rank in range(world):
            here, there = context.Pipe()
            given = (rank, world, self._store, cuda, prompt, there)
            process = context.Process(target=_serve, args=given, daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)
        self._collect(HANG)

    def run(self, module: str, function: str, *arguments: Any, timeout: float = HANG) -> list[Any]:
        """Results by rank of `module.function(platform, *arguments)`, called on all ranks together.

        Raises AssertionError with the first traceback; the pool is gone then, since its ranks are out of
        step.
        """
        for pipe in self._pipes:
            pipe.send((module, function, arguments))
        return self._collect(timeout)

    def _collect(self, timeout: float) -> list[Any]:
        results: list[Any] = [None] * self.world
        waiting = dict(enumerate(self._pipes))
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting.values()), timeout)
            failure = None if ready else f"no answer from ranks {sorted(waiting)} within {timeout} s"
            for rank, pipe in list(waiting.items()):
                if pipe in ready:
                    fine, results[rank] = pipe.recv()
                    del waiting[rank]
                    failure = failure if fine else f"rank {rank}: {results[rank]}"
            if failure:
                self.close()
                raise AssertionError(failure)
        return results

    def close(self) -> None:
        """End the ranks."""
        self.ended = True
        for process in self._processes:
            process.kill()
            process.join()
        if os.path.exists(self._store):
            os.unlink(self._store)


def run_command(
    arguments: list[str], world: int, folder: Path, entry: str = "mopexec.cli"
) -> tuple[int, str, str]:
    """`mopexec ARGUMENTS` (main of the module `entry`) as each of `world` ranks, as under the user's own
    torchrun; (exit code, standard output, standard error) of the first. folder: for their output."""
    port = free_port()
    context = fork_server()
    given = [(rank, world, port, arguments, folder, entry) for rank in range(world)]
    ranks = [context.Process(target=_command, args=one, daemon=True) for one in given]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(0 if ranks[0].exitcode else HANG)  # torchrun too ends the others of one that failed
        rank.kill()
    code = ranks[0].exitcode
    assert code is not None
    return code, (folder / "0.out").read_text(), (folder / "0.err").read_text()


def free_port() -> int:
    """A port that nothing listens on. Below those that systems hand out unasked, so that what other tests
    open meanwhile does not take it."""
    while True:
        port = random.randrange(15_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("localhost", port)):
            return port


def _command(rank: int, world: int, port: int, arguments: list[str], folder: Path, entry: str) -> None:
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sizes = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in (sizes | {"MASTER_PORT": port}).items()})
    os.environ.update({"MASTER_ADDR": "localhost", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    importlib.import_module(entry).main(arguments)


def probe_ranks_forked(monkeypatch: Any) -> None:
    """Ranks of `mopexec probe`, in this process, are forked, as those of `run_command`."""
    from mopexec.measure import probe_ranks

    context = fork_server()
    monkeypatch.setattr(probe_ranks.multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(probe_ranks, "_rank_main", _probe_rank)


def _probe_rank(rank: int, job: Any, store: str, messages: Any, parent: int) -> None:
    """The parent is the server that forked it."""
    from mopexec.measure import probe_ranks

    probe_ranks._rank_main(rank, job, store, messages, 0)


_POOLS: dict[tuple[int, bool], Pool] = {}


def pool(world: int, *, cuda: bool = False) -> Pool:
    """The pool of `world` ranks of this test process."""
    made = _POOLS.get((world, cuda))
    if made is None or made.ended:
        made = _POOLS[world, cuda] = Pool(world, cuda=cuda)
        atexit.register(made.close)
    return made
