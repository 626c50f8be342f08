"""One cell of the map: a network on a cluster at a context, the best of each family, and the papers' rule."""

from dataclasses import dataclass
from math import gcd
from typing import Any

import mopsim
from mopsim.api.on_stacks import attention_kernel, with_one_attention
from mopsim.common.errors import MopError
from mopsim.engine import SimResult
from mopsim.search.result import SearchResult
from mopsim.search.why import apart
from mopsim.spec.line import describe

PAPERS_VOCAB = 8
PAPERS_TOKENS = 65_536
"""P, and the tokens of a rank that the papers' context-parallel degrees give (arXiv 2609.14306)."""


@dataclass(frozen=True)
class Cell:
    """What is asked. tokens: of a GPU and step."""

    model: str
    hardware: str
    nodes: int
    seq_len: int
    tokens: int

    @property
    def devices(self) -> int:
        return self.nodes * mopsim.load_hardware(self.hardware).devices_per_node

    @property
    def global_batch(self) -> int:
        return max(1, self.devices * self.tokens // self.seq_len)

    @property
    def cluster(self) -> str:
        return f"{self.devices} {self.hardware.split('-')[0].upper()}"

    def job(self) -> dict[str, Any]:
        return {
            "model": self.model, "hardware": self.hardware, "nodes": self.nodes,
            "seq_len": self.seq_len, "global_batch": self.global_batch,
        }  # fmt: skip


def played(cell: Cell, budget: int) -> dict[str, Any]:
    """The best of each family that is sure to fit, fastest first, the lead over the next, the likeliest of
    each other family, what the winner does where no other microbatch hides experts' exchanges (apart), and
    MoP by the papers' rule."""
    ranking = mopsim.search(**cell.job(), budget=budget)
    found = ranking.found
    best = {family: one or _likeliest(found, family) for family, one in found.best_by_family.items()}
    order = sorted(
        ((family, one) for family, one in best.items() if one and one.sure),
        key=lambda item: item[1].step_time,
    )
    lead = order[0][1].times_as_fast_as(order[1][1]) if len(order) > 1 else None
    again = apart(order[0][1], ranking.problem) if order else None
    return {
        **cell.job(), "devices": cell.devices, "cluster": cell.cluster,
        "families": {
            family: _numbers(one) | {"attention": attention_kernel(one, ranking.inputs)}
            for family, one in order
        },
        "risky": {family: _numbers(one) for family, one in best.items() if one and not one.sure},
        "lead": {"ratio": lead.predicted, "interval": lead.interval(), "p_faster": lead.p_faster}
        if lead else None,
        "alike": with_one_attention(ranking.inputs, dict(order)),
        "apart": again.tokens_per_second_per_device if again else None,
        "gap": found.gap,
        "rule": papers_rule(cell),
    }  # fmt: skip


def _likeliest(found: SearchResult, family: str) -> SimResult | None:
    """Of a family of which nothing is sure to fit what may."""
    return next(iter(found.lacking[family].risky), None)


def _numbers(one: SimResult) -> dict[str, Any]:
    rate = one.tokens_per_second_per_device
    slow, fast = (rate * one.step_time / seconds for seconds in reversed(one.step_time_interval()))
    return {
        "tokens_per_s_per_device": rate, "interval": [slow, fast], "p_fits": one.p_fits,
        "p_fits_as_described": one.p_as_described,
        "strategy": describe(one.strategy),
    }  # fmt: skip


def papers_rule(cell: Cell) -> dict[str, Any]:
    """MoP with experts over all ranks (or over as many as divide them), P = 8, one sequence for each group
    of ranks that shares one, and so many groups that a rank has 65,536 tokens, or one sequence."""
    model = mopsim.load_model(cell.model)
    degree = max(1, cell.seq_len // PAPERS_TOKENS)
    strategy = mopsim.mop(
        expert_parallel=gcd(cell.devices, model.num_local_experts),
        context_parallel=degree,
        vocab_parallel=PAPERS_VOCAB,
    )
    try:
        one = mopsim.simulate(strategy=strategy, **cell.job()).result
    except MopError as error:
        return {"refused": str(error)}
    return _numbers(one) | {"fits": one.fits}
