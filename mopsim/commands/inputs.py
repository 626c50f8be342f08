"""From what the user typed to specs: models, profiles, training, strategies. Every refusal is one line."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mopsim
from mopsim.commands.options import Job
from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.common.units import parse_count
from mopsim.cost.compute import matmul_curve
from mopsim.engine import SimResult, simulate
from mopsim.search import Options, search
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import HardwareRef, Plan, Prediction
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.routing import RoutingProfile
from mopsim.spec.strategy import MatmulDType, Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import FAMILIES


@dataclass(frozen=True)
class Inputs:
    """The specs of a job."""

    model: ModelSpec
    hardware: HardwareProfile
    nodes: int
    training: TrainSpec
    precision: MatmulDType

    @property
    def world_size(self) -> int:
        return self.nodes * self.hardware.devices_per_node


def read(job: Job) -> Inputs:
    """Load what a job names. Raises MopError."""
    training = TrainSpec(
        seq_len=parse_count(job.seq_len, "--seq-len"),
        global_batch=job.global_batch,
        routing=read_routing(job.routing),
        seed=job.seed,
        learning_rate=job.learning_rate,
        warmup_steps=job.warmup_steps,
    )
    model = load_model(job.model)
    training.check_model(model)
    hardware = load_profile(job.hardware)
    matmul_curve(hardware, job.precision, field="--precision")
    return Inputs(model, hardware, job.nodes, training, job.precision)


def read_routing(text: str) -> RoutingProfile:
    """A routing profile by name, or the list of shares in a YAML file. Raises MopError."""
    if not text.endswith((".yaml", ".yml")):
        return text
    shares = io.parse_yaml(io.read_text(Path(text), "--routing"), text)
    if not isinstance(shares, list) or not all(type(share) in (int, float) for share in shares):
        raise MopError(f"--routing: {text}: must be a list of the experts' shares of all routes")
    return tuple(float(share) for share in shares)


def families(text: str, default: Sequence[str]) -> tuple[str, ...]:
    """The families of a comma-separated list. Raises MopError for an unknown one."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(","))) if text else tuple(default)
    for name in names:
        if name not in FAMILIES:
            raise MopError(f"--family: {name!r} is not one of {', '.join(FAMILIES)}")
    return names


def read_strategy(ref: str) -> Strategy | Plan:
    """A strategy from its YAML file, or a plan, whose strategy it is."""
    path = Path(ref)
    if path.suffix not in (".yaml", ".yml", ".json") and not io.exists(path):
        raise MopError(f"--strategy: {ref!r} is neither a family ({', '.join(FAMILIES)}) nor a YAML file")
    data = io.read_yaml(path, "--strategy")
    if isinstance(data, dict) and "strategy" in data and "model" in data:
        return io.convert(data, Plan, "plan", str(path))
    return io.convert(data, Strategy, "strategy", str(path))


def notes(refs: Sequence[str], inputs: Inputs) -> list[str]:
    """What the plans among `refs` were made for, where it is not this job: their strategy alone is taken."""
    found = []
    for ref in refs:
        read = None if ref in FAMILIES else read_strategy(ref)
        if isinstance(read, Plan):
            here = {
                "hardware": (read.hardware.name, inputs.hardware.name),
                "hardware digest": (read.hardware.digest, io.digest(inputs.hardware)),
                **{
                    name: (getattr(read.training, name), getattr(inputs.training, name))
                    for name in ("seq_len", "global_batch", "routing")
                },
            }
            other = [f"{name} {made} (here {now})" for name, (made, now) in here.items() if made != now]
            if other:
                found.append(f"note: of {ref} only the strategy is taken; it was made for {', '.join(other)}")
    return found


def _strategy(ref: str, inputs: Inputs) -> Strategy:
    """The strategy of a file, for this model. Raises MopError where it is of a plan for another one."""
    read = read_strategy(ref)
    if isinstance(read, Strategy):
        return read
    if read.model != inputs.model:
        made, here = (f"{one.name} (digest {io.digest(one)})" for one in (read.model, inputs.model))
        raise MopError(f"--strategy: {ref} is a plan for the model {made}, --model is {here}")
    return read.strategy


def resolve(ref: str, inputs: Inputs, *, any_plan: bool = True, budget: int = 100) -> SimResult:
    """The simulated result of a strategy file, or of the best (else the closest) strategy of a family."""
    if ref not in FAMILIES:
        strategy = _strategy(ref, inputs)
        return simulate(inputs.model, inputs.hardware, inputs.nodes, strategy, inputs.training)
    options = Options((ref,), top=1, budget=budget, any_plan=any_plan, precision=inputs.precision)
    found = search(inputs.model, inputs.hardware, inputs.nodes, inputs.training, options)
    result = found.best or found.closest
    if result is None:
        raise MopError(f"--strategy: {ref} has no strategy here: {found.verdict()}")
    return result


def make_plan(inputs: Inputs, result: SimResult) -> Plan:
    """The plan of a simulated strategy, with what it promises."""
    hardware = inputs.hardware
    return Plan(
        model=inputs.model,
        hardware=HardwareRef(
            name=hardware.name,
            digest=io.digest(hardware),
            num_nodes=inputs.nodes,
            devices_per_node=hardware.devices_per_node,
            memory_limit=hardware.memory_limit(),
            host_limit=result.host_limit,
        ),
        strategy=result.strategy,
        training=inputs.training,
        prediction=Prediction(
            step_time=result.step_time,
            tokens_per_second=result.tokens_per_second,
            peak_memory=result.peak_memory,
            host_memory=result.host_memory,
            memory_by_category=result.memory_by_category,
            time_by_kind=result.busy,
        ),
        mop_version=mopsim.__version__,
    )


def facts(inputs: Inputs) -> dict[str, str]:
    """What a report says of its own making."""
    command = " ".join(["mopsim", *sys.argv[1:]])
    return {
        "command": command,
        "hardware profile": f"{inputs.hardware.name} (digest {io.digest(inputs.hardware)})",
        "model": f"{inputs.model.name} (digest {io.digest(inputs.model)})",
        "version": mopsim.__version__,
        "seed": str(inputs.training.seed),
    }


def human(json: str | None) -> Any:
    """A rich console: standard output, or standard error where standard output carries the JSON."""
    from rich.console import Console

    return Console(stderr=json == "-", highlight=False)
