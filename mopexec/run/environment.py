"""What a launcher tells its ranks in environment variables; no torch needed to read it."""

import os
import re
import socket
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from mopsim.common.errors import MopError
from mopsim.spec.layout import ceil_div

LAUNCHER = "MOPEXEC_LAUNCHER"
"""The process that started the ranks."""


CORES = "MOPEXEC_CORES"
"""How many cores that process may use; it binds each rank with a GPU to those near it."""


PORT = 29500
"""Where ranks of several nodes meet, unless the launcher says otherwise; torchrun's own default."""


RESOLVE_SECONDS = 45.0
"""How long the name of the host where ranks meet may be unknown: that of a pod appears after its start."""


def check_host() -> None:
    """Wait until MASTER_ADDR has an address. Raises MopError where it has none after RESOLVE_SECONDS: a
    rendezvous would wait for half an hour."""
    name, end = os.environ["MASTER_ADDR"], time.monotonic() + RESOLVE_SECONDS
    while True:
        try:
            socket.getaddrinfo(name, None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() >= end:
                reason = getattr(error, "strerror", None) or str(error)
                raise MopError(
                    f"MASTER_ADDR: {name!r} must be a host that has an address: {reason}"
                ) from None
        time.sleep(1)


def under_torchrun() -> bool:
    """Whether torchrun (or a launcher that sets the same variables) started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def adopt_slurm() -> None:
    """Set torchrun's variables from SLURM's where `srun` started a task for each rank and nothing else did.

    The port is shifted by the job's number, so that two jobs on a node do not meet.
    """
    own = os.environ
    tasks = own.get("SLURM_NTASKS", "")
    if under_torchrun() or "SLURM_PROCID" not in own or not tasks.isdecimal() or int(tasks) < 2:
        return
    local = own.get("SLURM_TASKS_PER_NODE", own.get("SLURM_NTASKS_PER_NODE", tasks))
    number = own.get("SLURM_JOB_ID", "0")
    own.update(
        RANK=own["SLURM_PROCID"],
        WORLD_SIZE=tasks,
        LOCAL_RANK=own.get("SLURM_LOCALID", "0"),
        LOCAL_WORLD_SIZE=re.match(r"\d*", local).group() or tasks,  # type: ignore[union-attr]
    )
    own.setdefault("MASTER_ADDR", first_host(own.get("SLURM_JOB_NODELIST", "localhost")))
    own.setdefault("MASTER_PORT", str(PORT + (int(number) % 1000 if number.isdecimal() else 0)))


def first_host(hosts: str) -> str:
    """The first name of SLURM's list of hosts: `gpu[003-005,9],x` is gpu003."""
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+))?([^,\[\]]*)", hosts)
    if found is None:
        return hosts
    rest = hosts[found.end() :]
    behind = re.match(r"[^\]]*\]([^,]*)", rest)
    return found.group(1) + (found.group(2) or "") + (behind.group(1) if found.group(2) and behind else "")


@dataclass(frozen=True)
class RankPlace:
    """rank of world_size; local_rank of local_size on this node; port: where they meet."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    port: int

    @property
    def nodes(self) -> int:
        """Machines of the launch."""
        return ceil_div(self.world_size, self.local_size)


def place() -> RankPlace:
    """This process's, as its launcher's variables have it; the only rank's without them. Raises MopError
    naming the variable."""
    most = 2**31 - 1
    world_size = _number("WORLD_SIZE", 1, 1, most)
    local_size = _number("LOCAL_WORLD_SIZE", world_size, 1, most)
    return RankPlace(
        rank=_number("RANK", 0, 0, world_size - 1),
        world_size=world_size,
        local_rank=_number("LOCAL_RANK", 0, 0, local_size - 1),
        local_size=local_size,
        port=_number("MASTER_PORT", PORT, 1, 2**16 - 1),
    )


def threads() -> int:
    """Threads of a rank on a CPU: of OMP_NUM_THREADS the first, for it may list those of inner levels too.
    Raises MopError."""
    listed = os.environ.get("OMP_NUM_THREADS") or "1"
    return _checked("OMP_NUM_THREADS", listed.partition(",")[0].strip(), 1, 2**15 - 1)


def _number(name: str, default: int, least: int, most: int) -> int:
    return _checked(name, os.environ.get(name, str(default)), least, most)


def _checked(name: str, text: str, least: int, most: int) -> int:
    if not (text.isdecimal() and len(text) <= 10 and least <= int(text) <= most):
        raise MopError(f"{name}: {text!r} must be an integer from {least} to {most}")
    return int(text)


def launcher() -> int:
    """The process that started this rank; 0 where a launcher of another kind did."""
    return int(os.environ.get(LAUNCHER, "0"))


_PINNED = "pinned_max_cached_size_mb"
_ALLOCATORS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Settings of torch's allocators: it reads the first that is there, and no other (2.13)."""

_KNOWN_SINCE = (2, 13)
"""The first torch whose allocators know it (c10/core/AllocatorConfig.h of the wheels of 2.11, 2.12 and 2.13);
on a key that they do not know they end the process."""


def torch_knows_pinned() -> bool:
    """Whether the torch that is installed, if any, knows the setting; torch itself is not imported."""
    try:
        found = re.match(r"(\d+)\.(\d+)", version("torch"))
    except PackageNotFoundError:
        return False
    return found is not None and tuple(map(int, found.groups())) >= _KNOWN_SINCE


def gpu_rank_defaults() -> dict[str, str]:
    """What a rank on a GPU starts with: pinned blocks above 1 MiB take what was asked for, and go back to the
    system when they are freed. Torch would round each up to a power of two: 81.8 GiB for 48.7 of a rank of
    Qwen3-30B-A3B on 8; before 2.13 it does. With `pinned_max_round_threshold_mb` alone, a freed block is
    given to one who asks for more, up to the next power of two, and writes beyond it (torch up to 2.13,
    github.com/pytorch/pytorch/pull/192722)."""
    return {_ALLOCATORS[-1]: f"{_PINNED}:1"} if torch_knows_pinned() else {}


ROUNDED = (
    "this torch rounds pinned memory up to powers of two: the host may need twice what was planned, which is "
    "for torch 2.13 and later"
)


def gpu_rank_environment() -> dict[str, str]:
    """gpu_rank_defaults, added to what the user has set, in the variable that torch reads; nothing where the
    user has set the same."""
    name = next((name for name in _ALLOCATORS if name in os.environ), _ALLOCATORS[-1])
    given = os.environ.get(name, "")
    added = [] if _PINNED in given else list(gpu_rank_defaults().values())
    return {name: ",".join(filter(None, (given, *added)))} if added else {}


_ASK = "import sys; from mopexec.run.environment import torch_knows_pinned as known; sys.exit(not known())"

GPU_RANK_SCRIPT = f"""allocator={_ALLOCATORS[1]}  # torch reads one of two
[[ ! -v {_ALLOCATORS[0]} ]] || allocator={_ALLOCATORS[0]}
if [[ ${{!allocator:-}} != *{_PINNED}* ]]; then
  if python3 -c '{_ASK}'; then
    export "$allocator=${{!allocator:+${{!allocator}},}}{_PINNED}:1"
  else
    echo "{ROUNDED}" >&2
  fi
fi
echo "$allocator=${{!allocator:-}}" >&2"""
"""`gpu_rank_environment` in bash."""


TORCHRUN = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}
"""What torchrun starts with: the seconds that ranks may take to end their step and write a checkpoint after a
signal. Its own 30 are less than a step of a large plan."""


def cpu_rank_environment() -> dict[str, str]:
    """What a rank on a CPU starts with: one thread, and an allocator that keeps what it has (glibc's names).

    glibc gives large buffers back to the system when they are freed, so that the next one is zeroed page by
    page again: 5 % of a small step. Kept, freed memory is reused, as a GPU's caching allocator does.
    """
    return {
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),  # the most that glibc accepts
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
        "MALLOC_TOP_PAD_": str(64 * 2**20),
    }
