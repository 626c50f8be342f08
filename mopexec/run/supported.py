"""Which plans mopexec runs: those that the capability table does not refuse for their runtime."""

from mopsim.spec.capability import not_run
from mopsim.spec.plan import Plan


def check_supported(plan: Plan) -> None:
    """Raise SpecError naming the first field of `plan` that mopexec does not run. Needs no process group."""
    for refused in not_run(plan):
        raise refused
