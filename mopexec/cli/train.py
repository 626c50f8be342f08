"""`mopexec train`: hold the plan, the text and the directory against the rules, then start the ranks."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from mopexec import data
from mopexec.data import DataOptions
from mopexec.run import attempts, failures, kept, plans, writers
from mopexec.run.environment import adopt_slurm, check_host, place, under_torchrun
from mopexec.run.lock import run_lock
from mopexec.run.options import TrainOptions
from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.common.outputs import check_outputs, say
from mopsim.common.units import format_bytes, format_seconds, parse_bytes
from mopsim.spec.plan import EDITED, LOST, Plan


@dataclass(frozen=True)
class Earlier:
    """What an earlier run in `out` left: its reports by path, bytes of its steps."""

    out: Path
    reports: dict[Path, bytes]
    steps: int

    def put_back(self) -> None:
        """Where the new run ended before it made a step."""
        if _steps_size(self.out) == self.steps and not (self.out / "summary.json").is_file():
            for path, content in self.reports.items():
                io.write_bytes(path, content)


def run(**given: Any) -> int:
    """See `train`."""
    return train(options_of(given), given["json"], given["max_restarts"])


def train(options: TrainOptions, json: str | None, max_restarts: int) -> int:
    """The whole command; returns the exit code: 0, 1 a rank failed, 2 (raised) a mistake, 128 + n for signal
    n.
    """
    cache = data.cache_directory(options.cache)
    check_outputs({"--json": json}, {"--out": options.out, "--cache": cache})
    adopt_slurm()
    if under_torchrun():
        if attempts.left("mistake"):
            return 2
        with attempts.no_mistake_again():
            return _as_rank(options, json, max_restarts)
    plan = plans.read_supported(Path(options.plan), options.settings)
    plans.check_compiler(plan)
    _check_directory(options, plan)
    _check_machine(options, plan)
    _say_elsewhere(options, plan, 1)
    tokens, held_out = data.prepare_all(options.data, options.eval_data, plan.model.vocab_size, cache)
    options = msgspec.structs.replace(options, tokens=str(tokens), eval_tokens=str(held_out or ""))
    _check_with_torch(options, plan)
    options = msgspec.structs.replace(options, others=_others(options.console))
    with _held_directory(options, plan):
        from mopexec.run.launch import RankError, launch

        _say_unexportable(options, plan)
        try:
            stopped_by = launch(options, plan.strategy.world_size, max_restarts=max_restarts)
        except RankError as error:
            print(f"mopexec: {error}", file=sys.stderr)
            return 1
        return _conclude(options, plan, stopped_by, json)


def _others(console: str) -> float:
    """Part of the cores that other programs have, said where it is much; 0 where ranks have GPUs."""
    import torch

    if torch.cuda.is_available():
        return 0.0
    from mopexec.measure.probe_machine import usable_cores
    from mopexec.measure.quiet import loaded, others

    cores = usable_cores()
    share = others(cores)
    if line := loaded(share, len(cores), "step times are"):
        say(line, stderr=console == "stderr")
    return share


_LIMITS = ("device_limit", "host_limit")
_DATA = ("text_field", "loss_mask")


def options_of(given: dict[str, Any]) -> TrainOptions:
    """The run that the command's options ask for. Raises MopError, SpecError."""
    writers.check(given["log_to"] or ())
    own = kept.chosen(given["tokenizer"], given["init_from"], Path(given["out"]), resume=given["resume"])
    source = DataOptions(
        source=data_source(given["data"]),
        **own,
        **{name: given[name] for name in _DATA},
    )
    held_out = given["eval_data"]
    as_they_are = {name: given[name] for name in TrainOptions.__struct_fields__ if name in given}
    return TrainOptions(
        **as_they_are
        | {"plan": str(given["plan"]), "out": str(given["out"]), "data": source}
        | {"init_from": str(given["init_from"] or "")}
        | {"eval_data": held_out and msgspec.structs.replace(source, source=held_out)}
        | {name: _bytes(given[name], name) for name in _LIMITS}
        | {"warmup": given["warmup_steps_excluded"], "settings": tuple(given["set_"] or ())}
        | {"log_to": tuple(given["log_to"] or ())}
        | {"console": "stderr" if given["json"] == "-" else "stdout"}
    )


def _bytes(text: str | None, name: str) -> int | None:
    return None if text is None else parse_bytes(text, f"--{name.replace('_', '-')}")


def data_source(given: str | None) -> str:
    """What to train on: asked for on a machine with GPUs, the text that ships with Python elsewhere. Raises
    MopError.
    """
    if given is None:
        import torch

        if torch.cuda.is_available():
            raise MopError("--data: is needed: name a file or directory to train on, or 'python' to try")
    return given or data.PYTHON


def check_ranks_options(max_restarts: int) -> None:
    """Refuse what has no use for a rank of the user's own torchrun. Raises MopError."""
    if max_restarts:
        raise MopError(f"--max-restarts: {max_restarts} is torchrun's own option here: it starts the ranks")


def _as_rank(options: TrainOptions, json: str | None, max_restarts: int) -> int:
    """One rank of the user's own torchrun: the first one prepares the directory, all then train. Started
    again, it goes on with what its launch has begun.
    """
    check_ranks_options(max_restarts)
    plan = plans.read_supported(Path(options.plan), options.settings)
    plans.check_world(plan, place().world_size)
    check_host()
    _check_memory(options, plan, place().local_size)
    from mopexec.run.worker import run_rank

    first = place().rank == 0
    if first:
        again = attempts.left("begun") and plans.holds_run(Path(options.out))
        options = msgspec.structs.replace(options, resume=options.resume or again)
        _check_directory(options, plan)
    with _held_directory(options, plan) if first else nullcontext():
        if first:
            _say_elsewhere(options, plan, place().nodes)
            _say_unexportable(options, plan)
        failure = run_rank(options)
        if failure is not None:
            print(f"mopexec: {failures.one_line(failure)}", file=sys.stderr)
            return failures.exit_code(failure)
        return _conclude(options, plan, "", json) if first else 0


def _check_machine(options: TrainOptions, plan: Plan) -> None:
    """The refusals of this machine, before a text is read for hours: its devices and its memory."""
    import torch

    plans.check_devices(plan, torch.cuda.device_count())
    _check_memory(options, plan, plan.strategy.world_size)


def _check_with_torch(options: TrainOptions, plan: Plan) -> None:
    """The refusals that need torch and the text: weights of another network, text too short."""
    if options.init_from:
        from mopexec.weights.begin import open_weights

        open_weights(Path(options.init_from), plan).files.close()
    seed = plan.training.seed if options.seed is None else options.seed
    data.open_tokens(Path(options.tokens), plan.training, seed)
    if options.eval_tokens:
        from mopexec.run.evaluation import open_held_out

        open_held_out(Path(options.eval_tokens), options, plan, seed)


def _check_memory(options: TrainOptions, plan: Plan, ranks: int) -> None:
    import torch

    from mopexec.measure.probe_machine import machine_memory

    shared, copied = not torch.cuda.is_available(), options.checkpoint_async
    plans.check_memory(plan, machine_memory(), ranks=ranks, shared=shared, copied=copied)


def _say_elsewhere(options: TrainOptions, plan: Plan, nodes: int) -> None:
    """That what was predicted is of another plan, or the ranks are not where the plan has them and its times
    are of another network, in a line each."""
    if plan.edited:
        say(f"note: {EDITED}", stderr=options.console == "stderr")
    if said := plan.elsewhere(nodes):
        rest = "no measurement for calibrate (mopexec launch --torchrun writes a script for each node)"
        say(f"note: {said}: {rest}", stderr=options.console == "stderr")


def _say_unexportable(options: TrainOptions, plan: Plan) -> None:
    """What `export` would refuse of this run, in one line: later it is too late."""
    from mopexec.weights.export import check_exportable

    if options.routing == "profile":  # no router is balanced
        plan = msgspec.structs.replace(
            plan, training=msgspec.structs.replace(plan.training, bias_update_rate=0)
        )
    try:
        check_exportable(Path(options.out), plan)
    except MopError as refusal:
        say(f"note: mopexec export will refuse this run: {refusal}", stderr=options.console == "stderr")


@contextmanager
def _held_directory(options: TrainOptions, plan: Plan) -> Iterator[None]:
    """The run's directory, prepared and held for this run; as it was, where that makes no step. Raises
    MopError where another run holds it, or has used it since it was checked."""
    with run_lock(Path(options.out)):
        _check_directory(options, plan)
        earlier = _prepare_directory(options, plan)
        try:
            yield
        finally:
            earlier.put_back()


def _check_directory(options: TrainOptions, plan: Plan) -> None:
    """Refuse to begin over a run, or to go on as another one. Text that is not tokenised yet is left to the
    ranks, or to the next check. Raises MopError."""
    out = Path(options.out)
    plans.check_run_directory(out, resume=options.resume)
    if not options.resume:
        return
    from mopexec.run import checkpoint  # with torch's, another second to import
    from mopexec.run.state import run_state
    from mopexec.weights.begin import check_rules

    weights = kept.began_with_weights(out)
    if weights:
        check_rules(kept.folder_of(out), plan)
    found = checkpoint.newest_state(out)
    if found is None and weights and not options.init_from:
        raise MopError(f"--init-from: is needed: {out} began with weights, and has no checkpoint yet")
    if found is not None:
        seed, text = plan.training.seed if options.seed is None else options.seed, found[1].text_digest
        if options.tokens:
            text = data.open_tokens(Path(options.tokens), plan.training, seed).text_digest
        checkpoint.check_resumable(out, run_state(plan, 0, seed, text), options.steps)


def _prepare_directory(options: TrainOptions, plan: Plan) -> Earlier:
    """The plan in, the reports of an earlier run out; returns what they were."""
    out = Path(options.out)
    reports = [out / name for name in ("plan.yaml", "summary.json", "measurement.yaml")]
    earlier = Earlier(out, {path: path.read_bytes() for path in reports if path.is_file()}, _steps_size(out))
    io.write_text(
        out / "plan.yaml", io.to_yaml(plan) if options.settings else io.read_text(Path(options.plan))
    )
    (out / failures.LOGS).mkdir(exist_ok=True)
    for path in reports[1:]:
        path.unlink(missing_ok=True)
    if not options.resume:
        kept.forget(out)
    kept.keep_given(out, Path(options.init_from) if options.init_from else None, options.data.tokenizer)
    for old in (out / "checkpoints").glob(".writing_*"):
        shutil.rmtree(old, ignore_errors=True)
    return earlier


def _steps_size(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.stat().st_size if path.is_file() else 0


def _conclude(options: TrainOptions, plan: Plan, stopped_by: str, json: str | None) -> int:
    """Say how it ended, from what the first rank wrote."""
    from mopexec.run.launch import signal_code

    summary = Path(options.out) / "summary.json"
    if not summary.is_file():
        from mopexec.run import checkpoint

        name, last = stopped_by or "an unknown cause", checkpoint.latest(Path(options.out) / "checkpoints")
        rest = f" since the last, {last}; go on with --resume" if last else ""
        print(f"mopexec: stopped by {name} before a checkpoint was done{rest}", file=sys.stderr)
        return signal_code(stopped_by)
    outcome: dict[str, Any] = msgspec.json.decode(summary.read_bytes())
    if json is not None:
        io.write_json(json, outcome)
    stopped_by = outcome["stopped_by"]
    if stopped_by:
        print(
            f"mopexec: stopped by {stopped_by} after step {outcome['steps_done']}; "
            f"checkpoint {outcome['checkpoint']}; go on with --resume",
            file=sys.stderr,
        )
        return signal_code(stopped_by)
    say(_summary(outcome), stderr=json == "-")
    from mopexec.run.balance import fuller, starving

    for line in (
        fuller(plan, outcome["peak_memory_bytes"], outcome["routing"]),
        starving(Path(options.out), plan, outcome["expert_loads"]),
    ):
        if line:
            say(line, stderr=json == "-")
    return 0


def _summary(outcome: dict[str, Any]) -> str:
    predicted = outcome["predicted_step_time_s"]
    seen = outcome["memory_step"]
    until = f" (tracked until step {seen})" if seen < outcome["steps_done"] else ""
    disturbed = outcome["disturbed_steps"]
    count = "1 step is" if disturbed == 1 else f"{disturbed} steps are"
    left_out = f"; {count} left out of the time, disturbed by other programs" if disturbed else ""
    if outcome["others"] > LOST:
        left_out += f"; other programs had {outcome['others']:.0%} of the cores"
    against = f" (predicted {format_seconds(predicted)})" if predicted else ""
    speed = "no step time measured"
    if outcome["step_time_s"] is not None:
        first, last = outcome["first_step"], outcome["last_step_time_s"]
        own = f" from step {first} on" if first > 1 else ""
        if last is not None:
            own = f" over all launches of the run ({format_seconds(last)}{own})"
        speed = (
            f"{format_seconds(outcome['step_time_s'])} a step{own}{against}, "
            f"{outcome['tokens_per_s']:,.0f} tokens/s over all ranks"
        )
    return (
        f"{outcome['steps_done']} steps: loss {outcome['first_loss']:.4f} -> {outcome['last_loss']:.4f}, "
        f"{speed}, "
        f"peak memory {format_bytes(outcome['peak_memory_bytes'])} device, "
        f"{format_bytes(outcome['host_memory_bytes'])} host{until}{left_out}; in {outcome['run']}"
    )
