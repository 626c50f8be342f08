"""`mopexec probe`: measure this machine into a HardwareProfile that mopsim plans on."""

from collections.abc import Callable

import torch
from msgspec.structs import replace

from mopexec.measure import probe_machine
from mopexec.measure.probe_profile import build_profile
from mopexec.measure.probe_ranks import ProbeJob, Progress, parts, run_ranks
from mopexec.measure.quiet import loaded, others
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.plan import LOST
from mopsim.spec.profiles import BESIDE_PROBE


def probe(
    ranks: int | None = None, *, budget: float = 1.0, show_progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> HardwareProfile:  # fmt: skip
    """Measure this machine: about 15 s on two cores; one pinned process per rank, all at once.

    ranks: devices_per_node of the profile; by default every usable core, or every GPU where there is one.
    budget: scales the time spent on each part. say: takes a line where other programs have the cores.
    Raises MopError when `ranks` is out of range or a rank fails.
    """
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    cores = probe_machine.usable_cores()
    available = torch.cuda.device_count() if device_type == "cuda" else len(cores)
    ranks = probe_machine.check_ranks(ranks, available, "GPUs" if device_type == "cuda" else "cores")
    before = others(cores)
    # A machine with one core still runs two ranks in turns: time its collectives so.
    processes = max(ranks, 2) if device_type == "cpu" else ranks
    job = ProbeJob(processes, device_type, tuple(cores), budget)
    if show_progress:
        found = _with_bar(job, lambda progress: build_profile(run_ranks(job, progress), device_type, ranks))
    else:
        found = build_profile(run_ranks(job, lambda _: None), device_type, ranks)
    share = max(before, others(cores))
    if line := loaded(share, len(cores), "the profile is"):
        say(line)
    return noted(found, share, len(cores))


def noted(profile: HardwareProfile, share: float, cores: int) -> HardwareProfile:
    """The profile, whose notes say where others had more than LOST of the cores before it or after."""
    if share <= LOST:
        return profile
    return replace(profile, notes=f"{profile.notes} {BESIDE_PROBE}{share * cores:.1f} of the {cores} cores.")


def _with_bar(job: ProbeJob, work: Callable[[Progress], HardwareProfile]) -> HardwareProfile:
    """Run `work` under a progress bar on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("probe"), BarColumn(), TextColumn("{task.description:20}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting ranks", total=len(parts(job)) + 1)

        def progress(part: str) -> None:
            bar.update(task, description=part, advance=1)

        profile = work(progress)
        bar.update(task, description="done", advance=1)
        return profile
