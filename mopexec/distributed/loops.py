"""The threads in which gloo talks to the other ranks of a group on a CPU."""

import os
from contextlib import suppress

LOOP = "gloo_tcp_loop"
THREADS = "/proc/self/task"
LEAST = 19
"""The niceness of what runs only where nothing else does."""


def give_way() -> None:
    """Threads of groups made so far take cores that nothing else runs on (Linux; nothing elsewhere).

    While a message is there whose rank computes still, gloo asks for it again without a pause, on a core that
    this or another rank could compute on: of what ranks took for a step, up to half was that (gloo's
    transport/tcp reads a message once its buffer is given, and epoll tells of it until then).
    """
    for thread in os.listdir(THREADS) if os.path.isdir(THREADS) else ():
        with suppress(OSError), open(f"{THREADS}/{thread}/comm") as name:  # else it has ended
            if name.read().strip() == LOOP:
                os.setpriority(os.PRIO_PROCESS, int(thread), LEAST)
