"""One rank of a training run, from its first line to its exit code.

Run by the launcher: `-m mopexec.run.worker OPTIONS`.
"""

import json
import os
import sys
from pathlib import Path
from pkgutil import resolve_name

from mopexec.run import attempts, failures
from mopexec.run.environment import launcher, place
from mopexec.run.options import TrainOptions
from mopexec.run.signals import StopRequest, end_on_interrupts
from mopsim.common import io
from mopsim.common.garbage import all_stays, collected_seldom
from mopsim.common.outputs import lasting_streams
from mopsim.common.processes import end_with_parent


def run_rank(options: TrainOptions) -> failures.Failure | None:
    """Train as this rank; returns what went wrong, which is in the run's logs/ too, or None."""
    from mopexec.run import plans
    from mopexec.run.job import join, meet
    from mopexec.run.train import train

    own = place()
    try:
        plan, build = plans.read_plan(Path(options.plan), options.settings), resolve_name(options.build)
        all_stays()
        with join(meet()) as job, StopRequest() as stop:  # before, a signal ends the process: no step to end
            train(options, plan, job, build, stop)
    except Exception as error:
        failure = failures.report(Path(options.out) / failures.LOGS, own.rank, error)
        if failure.user_mistake:
            attempts.leave("mistake")
        return failure
    return None


def main() -> None:
    """Entry of a rank that the launcher started: it ends when the launcher does."""
    end_with_parent(launcher())
    end_on_interrupts()
    if attempts.left("mistake"):
        os._exit(2)
    with lasting_streams(), collected_seldom():
        failure = run_rank(io.convert(json.loads(sys.argv[1]), TrainOptions, "options"))
    os._exit(failures.exit_code(failure))  # a rank whose peers are gone must not wait for them at exit


if __name__ == "__main__":
    main()
