"""Reading a plan and holding it against this machine: refusals of one line, before anything is started."""

from collections.abc import Sequence
from pathlib import Path

from msgspec import structs

from mopexec.run import lock, supported
from mopsim.common import io
from mopsim.common.errors import MopError, SpecError, shown
from mopsim.common.units import format_bytes
from mopsim.spec import layout
from mopsim.spec.capability import ROWS, job_of
from mopsim.spec.plan import Plan
from mopsim.spec.tensors import checkpoint_bytes, tensors
from mopsim.spec.training import TrainSpec
from mopsim.spec.upgrade import load_plan

KEPT = "huggingface"
"""In a run's directory: the config of the weights that it began with, and the tokenizer that it was given."""
ASIDE, WRITING = f".{KEPT}", f".writing_{KEPT}"
"""The same, whole and not yet renamed; while it is written."""
TRAINED = "tokenizer.json"
"""In a run's directory: the tokenizer that was trained on its text."""

_PLANNED = ("seq_len", "global_batch", "routing")


def read_plan(path: Path, settings: Sequence[str] = ()) -> Plan:
    """The plan in a YAML file, with `settings` FIELD=VALUE of its training instead of the file's.

    Raises MopError or SpecError naming the field, its value and the rule.
    """
    plan = load_plan(path)
    if not settings:
        return plan
    training = io.to_plain(plan.training)
    for setting in settings:
        field, equals, value = setting.partition("=")
        if not equals or field not in training:
            names = ", ".join(name for name in training if name not in _PLANNED)
            raise MopError(f"--set: {setting!r}: is not FIELD=VALUE of plan.training ({names})")
        if field in _PLANNED:
            raise MopError(f"--set: {setting!r}: decides memory and time: search for a plan with it")
        training[field] = io.parse_yaml(value, f"--set {field}")
    new = structs.replace(plan, training=io.convert(training, TrainSpec, "plan.training", "--set"))
    for setting in settings:
        field = setting.partition("=")[0]
        value = getattr(new.training, field)
        changes = value and value != getattr(plan.training, field)
        if changes and not ROWS[f"training.{field}"].acts_in(job_of(new)):
            raise MopError(
                f"--set: {setting!r}: acts on nothing that the network {shown(plan.model.name)} has"
            )
    return new


def read_supported(path: Path, settings: Sequence[str] = ()) -> Plan:
    """`read_plan`, of what mopexec runs."""
    plan = read_plan(path, settings)
    check_supported(plan)
    return plan


def check_supported(plan: Plan) -> None:
    """Refuse a model or a mechanism that mopexec does not run, by name. Raises SpecError."""
    try:
        supported.check_supported(plan)
        if plan.stack.runtime == "flat_units":
            layout.check_buckets(params_of_rank(plan), plan.strategy.optimizer.bucket_params)
    except SpecError as refusal:
        raise refusal.within("plan") from None


def params_of_rank(plan: Plan) -> int:
    """Parameters that a rank of flat_units updates: its shards of the dense part and of the experts of each
    layer, of the embedding, the final norm and the head."""
    model, strategy = plan.model, plan.strategy
    whole: dict[tuple[str | int, bool], int] = {}
    for tensor in tensors(model):
        unit = tensor.name.split(".")[0] if tensor.layer < 0 else tensor.layer
        whole[unit, tensor.routed] = whole.get((unit, tensor.routed), 0) + tensor.numel
    found = 0
    for (unit, routed), numel in whole.items():
        how, degree, split = strategy.experts, strategy.dense.fsdp, 1
        if routed:
            degree, split = how.expert_fsdp, how.expert_parallel
        elif unit == "head" and strategy.vocabulary.loss == "ring":
            split = strategy.vocabulary.vocab_parallel
            numel = layout.ceil_div(model.vocab_size, split) * split * model.hidden_size
            degree = strategy.stage_ranks // split
        found += layout.shard_numel(numel // split, degree)
    return found


def check_compiler(plan: Plan) -> None:
    """Refuse to compile where this machine lacks what that needs. Raises SpecError."""
    if plan.strategy.compile == "none":
        return
    import torch

    from mopexec.operators import compiler

    compiler.check_compiler("plan.strategy.compile", cuda=torch.cuda.is_available())


def check_world(plan: Plan, world_size: int) -> None:
    """Refuse a launch of another number of ranks than the plan is for. Raises SpecError."""
    wanted = plan.strategy.world_size
    if world_size != wanted:
        raise SpecError("plan.strategy.world_size", wanted, f"is not the {world_size} ranks of this launch")


def check_devices(plan: Plan, num_devices: int) -> None:
    """Refuse more ranks than this machine's accelerators (0: a CPU, where ranks may share cores)."""
    wanted = plan.strategy.world_size
    if 0 < num_devices < wanted:
        raise SpecError(
            "plan.strategy.world_size",
            wanted,
            f"is more than the {num_devices} accelerator(s) of this machine; use torchrun for several nodes",
        )


def check_memory(plan: Plan, machine: int, *, ranks: int, shared: bool, copied: bool) -> None:
    """Refuse `ranks` that would need more than the `machine` bytes of this host: what is predicted for the
    host, for the device too where both are one (shared: a CPU), and their part of the copy of a checkpoint
    that is written beside the steps (copied). Raises MopError.
    """
    predicted = plan.predicted
    if predicted is None:
        return
    wanted = ranks * (predicted.host_memory + (predicted.peak_memory if shared else 0.0))
    limit, strategy = f"of memory, and this machine has {format_bytes(machine)}", plan.strategy
    if wanted > machine:
        rule = f"puts {ranks} ranks here, which would need {format_bytes(wanted)} {limit}"
        raise SpecError("plan.strategy.world_size", strategy.world_size, rule)
    wanted += copied * ranks / strategy.world_size * checkpoint_bytes(plan.model, strategy.precision)
    if wanted > machine:
        rule = f"with its copy on the host {ranks} ranks would need {format_bytes(wanted)} {limit}"
        raise MopError(f"--checkpoint-async: {rule}")


def holds_run(path: Path) -> bool:
    """Whether a run has got as far as its first step in this directory."""
    return any((path / name).exists() for name in ("metrics.jsonl", "checkpoints"))


def check_run_directory(path: Path, *, resume: bool) -> None:
    """Refuse a directory that holds something and is not to be resumed, or nothing and is."""
    entries = {entry.name for entry in path.iterdir()} - {lock.NAME} if path.is_dir() else set()
    without_step = {"plan.yaml", "logs"}  # all that such a run leaves, beside what it keeps
    occupied = bool(entries) and entries - {KEPT, ASIDE, WRITING, TRAINED} != without_step
    run = holds_run(path)
    if occupied and not resume:
        rest = "give --resume to go on with it, or another directory" if run else "give another directory"
        raise MopError(f"--out: {path} is not empty; {rest}")
    if resume and not run:
        raise MopError(f"--resume: {path} holds no run to go on with")
    checkpoints = path / "checkpoints"
    for there in (checkpoints, *checkpoints.glob("step_*"), *checkpoints.glob(".writing_*")):
        if there.exists() and not there.is_dir():
            raise MopError(f"--out: {there} is a file where a run keeps checkpoints")
