"""What a launcher tells its ranks in environment variables; no torch needed to read it."""

import os

LAUNCHER = "MOPEXEC_LAUNCHER"
"""The process that started the ranks."""


def under_torchrun() -> bool:
    """Whether torchrun (or a launcher that sets the same variables) started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def rank_of_environment() -> int:
    """This process's rank as its launcher set it; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def launcher() -> int:
    """The process that started this rank; 0 where a launcher of another kind did."""
    return int(os.environ.get(LAUNCHER, "0"))


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
