"""`mopexec launch`: what a cluster needs to train a plan, as a SLURM script or as torchrun's command."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mopexec.run import plans
from mopexec.run.environment import GPU_RANK_SCRIPT, PORT, TORCHRUN, gpu_rank_defaults
from mopexec.run.options import TrainOptions
from mopsim.common import io
from mopsim.common.errors import MopError, SpecError
from mopsim.common.outputs import STDOUT, check_outputs
from mopsim.spec.plan import Plan

Kind = Literal["slurm", "torchrun"]

_SLURM = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={devices}
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=TERM@600
# {summary}
# Before its time is over the job gets SIGTERM: a checkpoint is written, and a requeued job goes on from it.
set -euo pipefail
{allocator}
export {environment}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
resume=$(test -e {out}/metrics.jsonl && echo --resume || true)
srun torchrun --nnodes={nodes} --nproc-per-node={devices} --max-restarts=3 \\
  --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head:{port}" \\
  -m mopexec.cli train {arguments} $resume
"""

_TORCHRUN = """#!/bin/bash
# {summary}
# Run this on each of the {nodes} node(s), with HEAD set to the first one's address.
set -euo pipefail
{allocator}
export {environment}
torchrun --nnodes={nodes} --nproc-per-node={devices} --max-restarts=3 \\
  --rdzv-id={name} --rdzv-backend=c10d --rdzv-endpoint="${{HEAD:-localhost}}:{port}" \\
  -m mopexec.cli train {arguments} "$@"
"""

_TEMPLATES: dict[Kind, str] = {"slurm": _SLURM, "torchrun": _TORCHRUN}


def run(
    plan: Path, options: Sequence[str] | None, slurm: bool, torchrun: bool, script: str | None,
    json: str | None,
) -> None:  # fmt: skip
    """Print the script, or write it into `script`. options: of `mopexec train`, handed on."""
    if slurm == torchrun:
        raise MopError("launch: give one of --slurm and --torchrun")
    kind: Kind = "slurm" if slurm else "torchrun"
    path, options = plan, options or []
    check_outputs({"--script": script or STDOUT, "--json": json}, stdout=("--script", "--json"))
    given = check_train_options(path, options)
    whole = plans.read_supported(path, given.settings)
    if given.init_from and Path(given.init_from).is_dir():
        from mopexec.weights.begin import open_weights

        open_weights(Path(given.init_from), whole).files.close()
    text = render(whole, path, kind, options, given.out)
    if script in (None, STDOUT):
        print(text, end="", flush=True)
    else:
        io.write_text(Path(str(script)), text)
    if json:
        nodes, devices = _nodes(whole)
        found = {"kind": kind, "script": script or STDOUT, "nodes": nodes, "ranks_per_node": devices}
        io.write_json(
            json,
            found | {"environment": gpu_rank_defaults() | TORCHRUN, "train_options": options, "text": text},
        )


def check_train_options(path: Path, options: Sequence[str]) -> TrainOptions:
    """Hold what the cluster will be asked to run against the rules of `mopexec train`, here and now: those
    for ranks of torchrun, apart from files that only the cluster has. Raises MopError or the parser's error.
    """
    from mopexec.cli import app
    from mopexec.cli.train import check_ranks_options, options_of

    named = {one.split("=")[0] for one in options}
    if "--plan" in named:
        raise MopError("--plan: is given before --, not among the options of `mopexec train` too")
    for needed, value in (("--out", "DIR"), ("--data", "PATH")):
        if needed not in named:
            rule = f"among the options of `mopexec train`: mopexec launch ... -- {needed} {value} ..."
            raise MopError(f"{needed}: is needed {rule}")
    train = app.parser.commands["train"]
    given = train.make_context("train", ["--plan", str(path), *options]).params
    check_ranks_options(given["max_restarts"])
    return options_of(given)


def render(plan: Plan, path: Path, kind: Kind, options: Sequence[str], out: str) -> str:
    """The script for `plan`, which lies at `path`. out: the run's directory, as `options` name it. Raises
    SpecError for ranks that fill no whole nodes.
    """
    nodes, devices = _nodes(plan)
    ranks = plan.strategy.world_size
    return _TEMPLATES[kind].format(
        name=re.sub(r"[^A-Za-z0-9_.-]+", "-", f"mop-{plan.model.name}"),
        nodes=nodes,
        devices=devices,
        port=PORT,
        environment=" ".join(f"{name}={value}" for name, value in TORCHRUN.items()),
        allocator=GPU_RANK_SCRIPT,
        out=shlex.quote(out),
        arguments=shlex.join(["--plan", str(path), *options]),
        summary=f"{plan.model.name}, {plan.strategy.name}: {ranks} ranks on {plan.hardware.name}",
    )


def _nodes(plan: Plan) -> tuple[int, int]:
    """How many nodes, and the ranks of each. Raises SpecError."""
    ranks, devices = plan.strategy.world_size, plan.hardware.devices_per_node
    if ranks % devices and ranks > devices:
        raise SpecError("plan.strategy.world_size", ranks, f"fills no whole nodes of {devices} devices")
    return max(1, ranks // devices), min(ranks, devices)
