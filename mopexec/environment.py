"""What a launcher tells its ranks in environment variables; no torch needed to read it."""

import os


def under_torchrun() -> bool:
    """Whether torchrun (or a launcher that sets the same variables) started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def rank_of_environment() -> int:
    """This process's rank as its launcher set it; 0 without one."""
    return int(os.environ.get("RANK", "0"))
