"""The training loop of one rank, read top to bottom."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import torch

from mopexec import data
from mopexec.distributed.collectives import of_all
from mopexec.measure.card import Card
from mopexec.measure.quiet import Watch
from mopexec.measure.timers import KindTimer
from mopexec.measure.tracker import MemoryTracker
from mopexec.run import agreed, checkpoint
from mopexec.run.evaluation import Evaluation, training_tokens
from mopexec.run.failures import at_work
from mopexec.run.feed import Feed
from mopexec.run.job import RankJob
from mopexec.run.metrics import Display, MetricsFile, StepMetrics, Timed, measured_routing, measurement
from mopexec.run.options import TrainOptions
from mopexec.run.runner import Runner, StepResult
from mopexec.run.saver import Saver
from mopexec.run.schedule import learning_rate
from mopexec.run.signals import StopRequest
from mopexec.run.state import changed, run_state
from mopexec.run.traces import trace
from mopexec.run.writers import open_writers
from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.common.io import Spec
from mopsim.spec.plan import KindTiming, Plan
from mopsim.spec.routing import RoutingProfile

Build = Callable[..., Runner]
SUMMARY = "summary.json"
NO_UPDATE = StepResult(loss=0.0, grad_norm=0.0)
"""Of a step whose global batch has no target that counts; every rank sees that by itself."""
UNCOMPILED = "those of --tracked-steps run as they are, the next one compiles"
TRACKED_STEPS = 2
"""Steps watched for memory where nobody asked. A router may need more later: what is shown names the step."""


class TrainOutcome(Spec, frozen=True, kw_only=True):
    """How a run ended; summary.json. `stopped_by`: the signal that ended it early, else ''. step_time_s: of
    the median step of all processes under this strategy (as both peaks), None (tokens_per_s too) where none
    ran compiled and the plan compiles. last_step_time_s: of the last, which began with first_step, where
    others count. others, expert_loads, routing: as of the Measurement."""

    run: str
    steps_done: int
    stopped_by: str
    checkpoint: str
    first_loss: float
    last_loss: float
    step_time_s: float | None
    tokens_per_s: float | None
    peak_memory_bytes: int
    host_memory_bytes: int
    memory_step: int
    predicted_step_time_s: float | None
    first_step: int = 1
    last_step_time_s: float | None = None
    disturbed_steps: int = 0
    others: float = 0.0
    expert_loads: tuple[int, ...] = ()
    routing: RoutingProfile = "balanced"


def train(options: TrainOptions, plan: Plan, job: RankJob, build: Build, stop: StopRequest) -> TrainOutcome:
    """Train `plan` until options.steps optimizer steps are done in all, on every rank together.

    build: as `mopexec.run.apply.build`. stop: asked after every step. Writes metrics.jsonl, checkpoints/,
    measurement.yaml and summary.json into options.out. Raises MopError, WorkError from the first step on."""
    seed = plan.training.seed if options.seed is None else options.seed
    dataset = data.open_tokens(training_tokens(options, plan, job), plan.training, seed)
    resumed, done, passed = None, 0, list[str]()
    wanted = run_state(plan, 0, seed, dataset.text_digest, dataset.tokenizer_digest, **_rules(options))
    if options.resume or job.again:
        resumed = checkpoint.check_resumable(Path(options.out), wanted, options.steps)
    torch.manual_seed(seed)
    tracking = _Tracking(options, compiled=plan.strategy.compile != "none")
    options = msgspec.structs.replace(options, warmup=max(options.warmup, tracking.slow))
    display = Display(visible=job.rank == 0, stderr=options.console == "stderr", steps=options.steps)
    with tracking.tracker:
        begin = _weights(options, plan, resumed, display)
        runner = build(plan, job.platform, routing=options.routing, seed=seed, **begin)
    if resumed:
        resumed, done, passed = checkpoint.load_newest(resumed.parent, runner)

    loop = _Loop(options, plan, job, runner, dataset, tracking, stop, done, display)
    loop.saver.last = resumed
    for problem in passed:
        loop.display.say(f"{problem}; going on from the one before")
    if resumed:
        loop.display.say(f"going on after step {done}, from {resumed}")
        if other := changed(checkpoint.read_state(resumed), wanted):
            loop.display.say(f"warning: the steps from here on are made with {other}")
    if options.resume and not resumed:
        loop.display.say(f"{options.out} has no checkpoint yet: it begins again with the first step")
    if tracking.slow:
        loop.display.say(tracking.compiles(done))
    loop.say_data()
    with at_work(plan.strategy.compile), closing(loop):
        loop.run()
        kinds = {} if loop.stopped_by else loop.profile()
        return loop.conclude(kinds)


class _Loop:
    """The steps of one run: what they share, and what they leave."""

    def __init__(
        self,
        options: TrainOptions,
        plan: Plan,
        job: RankJob,
        runner: Runner,
        dataset: data.TokenDataset,
        tracking: "_Tracking",
        stop: StopRequest,
        done: int,
        display: Display,
    ) -> None:
        self.options, self.plan, self.job, self.runner, self.dataset = options, plan, job, runner, dataset
        self.tracking, self.stop, self.done, self.first_step = tracking, stop, done, done
        self.out = Path(options.out)
        self.feed = Feed(plan, dataset, job.rank, job.platform.device)
        self.evaluation = Evaluation.of(options, plan, job, dataset.seed)
        self.tokens_per_step = plan.training.global_batch * plan.training.seq_len
        self.card = Card(job.platform.device)
        self.memory_limit = options.device_limit or plan.hardware.memory_limit
        self.prediction = plan.predicted
        self.predicted = self.prediction.step_time if self.prediction else None
        self.strategy = io.digest(plan.strategy)
        self.watch = Watch(job.cores)
        self.step_times, self.idle_times = list[Timed](), list[Timed]()
        self.busiest: list[float] = []
        self.loads: tuple[int, ...] = ()
        self.of_cards = dict[str, int]()
        self.first_loss, self.last_loss = 0.0, 0.0
        self.stopped_by = ""
        self.saver = Saver(
            self.out / "checkpoints",
            runner,
            job.platform,
            keep=options.keep,
            done=done,
            background=options.checkpoint_async,
        )
        first = job.rank == 0
        self.metrics = MetricsFile(self.out / "metrics.jsonl", done) if first else None
        settings = io.to_plain(plan.training) if first else {}
        self.writers = open_writers(options.log_to if first else (), self.out, settings)
        self.display = display
        display.begin(done)

    def say_data(self) -> None:
        """Size of the data, and how often the run goes over it."""
        held = self.dataset.num_windows * self.dataset.seq_len
        taken = self.options.steps * self.tokens_per_step
        self.display.say(
            f"data: {self.dataset.num_tokens:,} tokens; {self.options.steps} steps take {taken:,}, "
            f"{taken / held:.2g} epochs of it"
        )

    def run(self) -> None:
        """Every step that is left, or those until a signal asks for the end."""
        for step in range(self.first_step, self.options.steps):
            if step - self.first_step <= self.options.warmup:
                self.watch.begin()
            lr = learning_rate(self.plan, step, self.options.steps, self.options.schedule)
            self.runner.set_lr(lr)
            result, own = self._timed_step(step)
            slowest = agreed.largest(own, self.tracking.tracker, self.stop, self.card.end(), self.job)
            self.of_cards = agreed.fullest(self.of_cards, slowest)
            self.busiest.append(result.busiest)
            self.loads = result.expert_loads or self.loads
            line = self._line(step, lr, result, slowest)
            self._record(line)
            stopping = bool(slowest["stop"])
            if slowest["failed"]:
                self.saver.wait()
            if stopping or self._checkpoint_due():
                self._save()
            self._tell(self._evaluated(line))
            if stopping or line.step == self.options.steps:
                self.saver.wait()
            if stopping:
                # the signal may have reached another rank only
                self.stopped_by = next(filter(None, of_all(self.stop.signal_name)), "")
                return

    def _timed_step(self, step: int) -> tuple[StepResult, dict[str, float]]:
        """One optimizer step on this rank, its seconds and CPU seconds, and whether a checkpoint failed. The
        batches count as memory of the step. An update beside the next step goes on."""
        with self.tracking.step(step - self.first_step):
            batches = self.feed.batches(step)
            self.job.platform.settle()
            self.card.begin()
            start, used = time.perf_counter(), time.process_time()
            result = self.runner.step(batches) if batches[0].num_targets else NO_UPDATE
            self.job.platform.settle()
            seconds, used = time.perf_counter() - start, time.process_time() - used
            said = {"seconds": seconds, "used": used, "failed": float(self.saver.failed)}
            return result, said | {"targets": float(batches[0].num_targets)}

    def _line(self, step: int, lr: float, result: StepResult, slowest: dict[str, float]) -> StepMetrics:
        tokens_per_s = self.tokens_per_step / slowest["seconds"]
        known = self.prediction if self.prediction and self.prediction.mfu else None
        faster = known.step_time / slowest["seconds"] if known else 1.0
        return StepMetrics(
            step=step + 1,
            since=self.first_step + 1,
            strategy=self.strategy,
            targets=int(slowest["targets"]),
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=lr,
            step_time_s=slowest["seconds"],
            tokens_per_s=tokens_per_s,
            tokens_per_s_per_device=tokens_per_s / self.job.world_size,
            peak_memory_bytes=int(slowest["device"]),
            host_memory_bytes=int(slowest["host"]),
            memory_step=self.tracking.last(step, self.first_step) + 1,
            memory_percent=100 * slowest["device"] / self.memory_limit if self.memory_limit else 0.0,
            predicted_step_time_s=self.predicted,
            **agreed.of_cards(slowest),
            cpu_time_s=None if self.job.platform.is_cuda else slowest["used"],
            mfu=known.mfu * faster if known else None,
            tflops_per_s_per_device=known.model_flops_per_second * faster / 1e12 if known else None,
            expert_loads=result.expert_loads or None,
        )

    def _record(self, line: StepMetrics) -> None:
        """Into metrics.jsonl, before the step's checkpoint. Raises MopError where the run diverged."""
        self.done = line.step
        if line.targets:
            self.first_loss = self.first_loss if self.step_times else line.loss
            self.last_loss = line.loss
        uncompiled = bool(self.tracking.slow) and line.step <= line.memory_step + 1
        timed = Timed(line.step_time_s, line.cpu_time_s, uncompiled)
        (self.step_times if line.targets else self.idle_times).append(timed)
        if self.metrics:
            self.metrics.write(line)
        if not math.isfinite(line.loss) or not math.isfinite(line.grad_norm):
            self._tell(line)
            self.saver.wait()
            raise MopError(
                f"step {line.step}: loss {line.loss}, gradient norm {line.grad_norm}: "
                f"the run diverged at learning rate {line.lr:.2e}"
            )

    def _evaluated(self, line: StepMetrics) -> StepMetrics:
        """The line with the loss of the held-out data, where that is due. A checkpoint is whole before."""
        if self.evaluation is None or not self.evaluation.due(line.step):
            return line
        self.saver.wait()
        line = msgspec.structs.replace(line, eval_loss=self.evaluation.loss(self.runner))
        if self.metrics:
            self.metrics.rewrite(line)
        return line

    def _tell(self, line: StepMetrics) -> None:
        for writer in self.writers:
            writer.write(line.step, line.numbers())
        self.display.step(line)

    def _checkpoint_due(self) -> bool:
        every = self.options.checkpoint_every
        last = self.done == self.options.steps and self.options.final_checkpoint
        return last or (every > 0 and self.done % every == 0)

    def _save(self) -> None:
        plan, given, rules = self.plan, self.dataset, _rules(self.options)
        text, tokenizer = given.text_digest, given.tokenizer_digest
        self.saver.save(run_state(plan, self.done, given.seed, text, tokenizer, **rules))

    def profile(self) -> dict[str, KindTiming]:
        """Kinds of work from extra steps after the last one; nothing keeps their updates."""
        if self.options.trace_steps:
            trace(self.out, self.job.rank, self.job.platform.device, self._extra_steps)
        timer = KindTimer(cuda=self.job.platform.is_cuda)
        for number in range(self.options.profile_steps):
            batches = self.feed.batches(self.options.steps + number)
            with timer:
                self.runner.step(batches)
        return timer.kinds() if self.options.profile_steps else {}

    def _extra_steps(self) -> None:
        for number in range(self.options.trace_steps):
            self.runner.step(self.feed.batches(self.options.steps + number))
        self.job.platform.synchronize()

    def close(self) -> None:
        self.display.close()
        for writer in self.writers:
            writer.close()
        if self.metrics:
            self.metrics.close()

    def conclude(self, kinds: dict[str, KindTiming]) -> TrainOutcome:
        """Write the measurement of this process's steps, and how the run ended."""
        metrics, compiles = self.metrics, bool(self.tracking.slow)
        earlier = metrics.first_loss if metrics else None
        before = metrics.step_times(self.strategy, compiles=compiles) if metrics else []
        device, host = metrics.highest(self.strategy) if metrics else (0, 0)
        own = self.step_times or self.idle_times
        seen = agreed.peaks(self.tracking.tracker, self.watch.share())
        measured = measurement(
            self.plan,
            step_times=[*before, own],
            warmup=self.options.warmup,
            tokens_per_step=self.tokens_per_step,
            kinds=kinds,
            memory=seen | self.of_cards,
            first_loss=self.first_loss if earlier is None else earlier,
            last_loss=self.last_loss,
            device=self.job.platform.device,
            routing=measured_routing(
                self.plan, self.busiest[min(self.options.warmup, len(self.busiest) - 1) :]
            ),
            others=max(self.options.others, seen["others"]),
            expert_loads=self.loads,
        )
        if not measured.step_times:
            self.display.say(f"no step time is measured: none of the steps ran compiled ({UNCOMPILED})")
        outcome = TrainOutcome(
            run=str(self.out),
            steps_done=self.done,
            stopped_by=self.stopped_by,
            checkpoint=str(self.saver.last or ""),
            first_loss=measured.first_loss,
            last_loss=measured.last_loss,
            step_time_s=measured.step_time_median or None,
            tokens_per_s=measured.tokens_per_second or None,
            peak_memory_bytes=max(device, measured.peak_memory),
            host_memory_bytes=max(host, measured.host_memory),
            memory_step=self.tracking.last(self.done - 1, self.first_step) + 1,
            predicted_step_time_s=self.predicted,
            first_step=self.first_step + 1,
            last_step_time_s=Timed.median(own, self.options.warmup) if before else None,
            disturbed_steps=measured.disturbed,
            others=measured.others,
            expert_loads=measured.expert_loads,
            routing=measured.routing,
        )
        if self.job.rank == 0:
            io.write_yaml(self.out / "measurement.yaml", measured)
            io.write_json(str(self.out / SUMMARY), outcome)
        return outcome


def _rules(options: TrainOptions) -> dict[str, str | int]:
    """Of the options, what the steps are made with: of all but a constant rate, how many there are too."""
    rules: dict[str, str | int] = {"--schedule": options.schedule, "--routing": options.routing}
    return rules if options.schedule == "constant" else rules | {"--steps": options.steps}


def _weights(options: TrainOptions, plan: Plan, resumed: Path | None, display: Display) -> dict[str, Any]:
    """What the runner is built with beside a seed: weights of --init-from, unless a checkpoint has others."""
    if not options.init_from or resumed:
        return {}
    from mopexec.weights.begin import told_weights

    return {"weights": told_weights(Path(options.init_from), plan, display.say)}


class _Tracking:
    """The tracker counts while the runner is built and in its first steps; in all, where it has a limit to
    enforce, no options.tracked_steps are given, and nothing is compiled, which it would keep from running.
    slow: steps up to the one that compiles."""

    def __init__(self, options: TrainOptions, *, compiled: bool) -> None:
        self.tracker = MemoryTracker(options.device_limit, options.host_limit)
        limited = options.device_limit is not None or options.host_limit is not None
        self._always = limited and not options.tracked_steps and not compiled
        self._first = options.tracked_steps or TRACKED_STEPS
        self.slow = self._first + 1 if compiled else 0

    def compiles(self, done: int) -> str:
        """When layers are compiled, in a process that goes on after step `done`."""
        first = done + self.slow
        return f"memory is tracked until step {first - 1}, uncompiled; step {first} compiles (slow)"

    def last(self, step: int, first: int) -> int:
        """The last step (from 0) that was watched up to `step`, in a process that began with `first`."""
        return step if self._always else min(step, first + self._first - 1)

    def step(self, number: int) -> AbstractContextManager[Any]:
        """`number`: from 0, of this process."""
        return self.tracker if self._always or number < self._first else nullcontext()
