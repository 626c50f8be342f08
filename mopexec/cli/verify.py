"""`mopexec verify`: scale the plan down, start the ranks, print the table."""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from mopexec.check.scale_down import mechanisms, scale_down
from mopexec.run import failures, plans
from mopsim.common import io
from mopsim.common.outputs import check_outputs, plain_console
from mopsim.spec.plan import Plan

_ROWS = (("loss", ""), ("grad_norm", ""), ("gradients", "worst_gradient"), ("weights", "worst_weight"))


def run(plan: Path, steps: int, ranks: int | None, json: str | None) -> int:
    """Returns 0 where parallel equals single-device within the tolerance, 1 where it does not or a rank
    failed."""
    check_outputs({"--json": json})
    whole = plans.read_plan(plan)
    plans.check_supported(whole)
    small = scale_down(whole, ranks or 4)
    plans.check_supported(small)
    plans.check_compiler(small)
    from mopexec.run.launch import RankError, signal_code

    _hide_devices(small.strategy.world_size)
    folder = Path(tempfile.mkdtemp(prefix="mopexec-verify-"))
    try:
        stopped = _start(folder, small, steps)
        found = None if stopped else _read(folder)
    except RankError as error:  # its logs stay
        print(f"mopexec: {error}", file=sys.stderr)
        return 1
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if found is None and not stopped:
        print(f"mopexec: the ranks ended and left no result; logs in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    if found is None:
        print(f"mopexec: stopped by {stopped}", file=sys.stderr)
        return signal_code(stopped)
    return _report(found, small, steps, json)


def _start(folder: Path, small: Plan, steps: int) -> str:
    """The signal that stopped the ranks, or ''."""
    from mopexec.run.launch import launch_ranks

    io.write_yaml(folder / "plan.yaml", small)
    ranks, logs = small.strategy.world_size, folder / failures.LOGS
    return launch_ranks("mopexec.check.verify", (str(folder), str(steps)), ranks, logs)


def _read(folder: Path) -> dict[str, Any] | None:
    """What the first rank found, None where it left nothing."""
    result = folder / "differences.json"
    return msgspec.json.decode(result.read_bytes()) if result.is_file() else None


def _hide_devices(ranks: int) -> None:
    """Fewer accelerators than ranks: verify on the CPU instead."""
    import torch

    if torch.cuda.device_count() < ranks:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _report(found: dict[str, Any], small: Plan, steps: int, json: str | None) -> int:
    from rich.table import Table

    from mopexec.check.verify import TOLERANCE

    passed = all(found[name] <= TOLERANCE for name, _ in _ROWS)
    if json is not None:
        extra = {"passed": passed, "tolerance": TOLERANCE, "ranks": small.strategy.world_size, "steps": steps}
        io.write_json(json, {**extra, **found, "mechanisms": mechanisms(small)})
    console = plain_console(stderr=json == "-")
    title = f"{small.strategy.name} on {small.strategy.world_size} ranks against one device, float64"
    table = Table(title=title)
    for column in ("quantity", "largest relative difference", "worst at", "result"):
        table.add_column(column, overflow="fold")
    for name, worst in _ROWS:
        result = "equal" if found[name] <= TOLERANCE else "DIFFERENT"
        table.add_row(name, f"{found[name]:.1e}", found[worst] if worst else "", result)
    console.print(table)
    console.print("at work: " + "; ".join(mechanisms(small)))
    console.print(f"{'passed' if passed else 'FAILED'}: {steps} optimizer steps, tolerance {TOLERANCE:.0e}")
    return 0 if passed else 1
