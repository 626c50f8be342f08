"""mopsim.simulate and mopsim.search."""

from collections.abc import Callable, Sequence

from mopsim.api.idle import idle
from mopsim.api.inputs import (
    AnyHardware,
    AnyModel,
    AnyStack,
    AnyStrategy,
    Count,
    Inputs,
    NoStrategyError,
    notes,
    plans_of,
    read_families,
    read_inputs,
    strategy_of,
)
from mopsim.api.results import Ranking, Simulation
from mopsim.common.arguments import named
from mopsim.common.errors import SpecError
from mopsim.engine import SimResult
from mopsim.search import Options
from mopsim.search import search as ranked
from mopsim.search.space import IN_8_BITS
from mopsim.spec.strategy import CAST, MatmulDType
from mopsim.strategies import FAMILIES


@named
def simulate(
    model: AnyModel,
    hardware: AnyHardware,
    *,
    strategy: AnyStrategy,
    seq_len: Count,
    global_batch: int,
    nodes: int = 1,
    routing: str | Sequence[float] = "balanced",
    document_tokens: Count | None = None,
    precision: MatmulDType | None = None,
    learning_rate: float | None = None,
    warmup_steps: int | None = None,
    clip_norm: float | None = None,
    seed: int | None = None,
    stack: AnyStack | None = None,
    interval: float = 0.9,
) -> Simulation:
    """Simulate one optimizer step: its time, its memory, and the waits of compute by cause.

    model: a preset's name, a YAML file, a Hugging Face config.json or a ModelSpec. hardware: a profile's
    name, a YAML file or a HardwareProfile. nodes: machines of `hardware`. seq_len: tokens of a sequence
    (32768 or "32K"). global_batch: sequences of one step. strategy: mopsim.mop(...) or another family's
    function, a Strategy, a strategy or plan file, or a family's name, whose best strategy is searched.
    routing: how tokens choose experts (mopsim.spec.routing). document_tokens: length of packed documents
    that attention does not cross: that of a token's document, averaged over tokens (1140, "2K"), or
    "MEAN/SPREAD" of log-normal lengths ("485/1", mopsim.spec.documents). 0: attention crosses documents.
    Default: a given plan's, else 0. precision: precision of the matrix products if a family is searched;
    default: bfloat16. It is refused if a strategy computes in another one. learning_rate: for the
    resulting plan; default: a given plan's, like all other training values of a plan. warmup_steps: as
    learning_rate. seed: as learning_rate. stack: the software that runs the strategy: a name, a YAML file
    or a Stack; default: the one that the strategy is meant for. interval: probability of the intervals of
    time and memory.

    A strategy that does not fit is a result (`fits` is False). Raises MopError, one line with field, value
    and rule, for an impossible job: an unknown name, a degree that does not divide, a batch that does not
    split."""
    inputs = read_inputs(
        model, hardware, nodes=nodes, seq_len=seq_len, global_batch=global_batch, routing=routing,
        document_tokens=document_tokens, precision=precision, learning_rate=learning_rate,
        warmup_steps=warmup_steps, clip_norm=clip_norm, seed=seed, stack=stack, interval=interval,
        strategies=[strategy],
    )  # fmt: skip
    return played(strategy, inputs)


def played(
    given: AnyStrategy,
    inputs: Inputs,
    *,
    runnable: bool = False,
    budget: int = 100,
    progress: Callable[[int, SimResult | None], None] | None = None,
) -> Simulation:
    """One step of a strategy, or of the best (else the closest) of a family: what simulate, compare and its
    sweeps are made of. runnable, budget, progress: of a family's search. Raises NoStrategyError for a family
    that has none, else MopError."""
    if not (isinstance(given, str) and given in FAMILIES):
        strategy, own = strategy_of(given, inputs)
        inputs = inputs.trained_as(*plans_of([given]))
        result = inputs.simulate(strategy, inputs.stack or own)
        said = [*notes([given], inputs), *idle(strategy, inputs.stack or own, inputs)]
        return Simulation(inputs, result, said)
    if inputs.of_families in CAST and given not in IN_8_BITS:
        rule = f"is not for the family {given}, only for {' and '.join(IN_8_BITS)}"
        raise SpecError("precision", inputs.precision, rule)
    found = ranked(inputs.problem(runnable=runnable), Options((given,), budget=budget, prove=True), progress)
    best = found.best or found.closest
    if best is None:
        raise NoStrategyError(f"strategy: {given} has no strategy here: {found.verdict()}")
    said = [*notes([given], inputs), *idle(best.strategy, best.stack, inputs)]
    said += filter(None, (found.doubt, found.exhausted()))
    return Simulation(inputs, best, said, found)


@named
def search(
    model: AnyModel,
    hardware: AnyHardware,
    *,
    seq_len: Count,
    global_batch: int,
    nodes: int = 1,
    families: str | Sequence[str] | None = None,
    top: int = 5,
    budget: int = 100,
    runnable: bool = False,
    at_risk: bool = False,
    confidence: float = 0.0,
    any_routing: bool = False,
    routing: str | Sequence[float] = "balanced",
    document_tokens: Count | None = None,
    precision: MatmulDType = "bfloat16",
    learning_rate: float = 3e-4,
    warmup_steps: int = 0,
    clip_norm: float = 1.0,
    seed: int = 0,
    stack: AnyStack | None = None,
    interval: float = 0.9,
    jobs: int = 1,
    progress: Callable[[int, SimResult | None], None] | None = None,
) -> Ranking:
    """Rank the strategies that fit with probability 0.9, fastest first, or where none does the likeliest
    first; `.best.save_plan(path)` writes the first one's plan.

    families: some of "mop", "fsdp2", "zero_offload", "megatron"; default: all. top: number of strategies
    to rank. budget: most simulations of each family, so that more families are never worse. runnable: rank
    only plans that mopexec runs. at_risk: rank by speed alone, also plans that fit with a lower probability.
    confidence: rank only plans of which P(fits), which allows for a program that is not as its stack says, is
    at least this.
    any_routing: rank only plans that fit however unevenly the router chooses. progress: called as
    progress(simulated, best so far). jobs: processes that search families side by side, with the same result.

    The other arguments are those of mopsim.simulate. Raises MopError. That nothing fits is a result."""
    inputs = read_inputs(
        model, hardware, nodes=nodes, seq_len=seq_len, global_batch=global_batch, routing=routing,
        document_tokens=document_tokens, precision=precision, learning_rate=learning_rate,
        warmup_steps=warmup_steps, clip_norm=clip_norm, seed=seed, stack=stack, interval=interval,
    )  # fmt: skip
    options = Options(
        read_families(families), top, budget, at_risk, confidence, any_routing, jobs=jobs, prove=True
    )
    problem = inputs.problem(runnable=runnable)
    return Ranking(inputs, problem, options, ranked(problem, options, progress))
