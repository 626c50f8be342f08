"""Routing of pretrained routers, where a row says `natural` and nobody counted: on text, and on the filler
of benchmarks.

What is published is how much more the busiest rank gets than the mean one. Experts' shares are taken to be
lognormal, and experts to lie on ranks in no order; one spread of the shares then gives the busiest rank's
load at any degree of expert parallelism.

A filler text that repeats one word is another matter: the states of repeated tokens become alike (arXiv
2503.08908), whatever their position, so that all copies choose alike.
"""

import random
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from math import exp, log, sqrt
from statistics import NormalDist, fmean

SPREAD = 0.78
"""Standard deviation of an expert's share over the mean share. Without balancing, the busiest rank of MoE
networks of 106 to 671 billion parameters, in training and prefill on rack-scale nodes, got 1.30 to 4.01 times
the mean (UltraEP, arXiv 2606.04101); 0.78 gives their middle by ratio, 2.28, on 64 ranks of 4 experts, the
degree being assumed. On 8 ranks of 16 it gives 1.29. The Gini coefficient is 0.37: arXiv 2605.20982 has 0.15
to 0.24 and more on text and 0.29 to 0.38 on mock tokens, Qwen3-30B between its other networks. A log of
Qwen3-30B's fine-tuning prints a balancing loss of 1.43 (file index id 61936658682), 1.57 by this spread."""
ORDERS = 400
"""Orders of the experts on the ranks over which the busiest rank's load is averaged: its mean is then known
within half a per cent."""
WIDEST, HALVINGS = 64.0, 48
"""Where nearly all routes go to one expert; halvings after which a width is known."""


@lru_cache(maxsize=64)
def natural(experts: int, ranks: int, balance_loss: float | None = None) -> tuple[float, ...]:
    """Share of all routes of each expert: quantiles of the lognormal, in the order of ORDERS random ones that
    gives the busiest of `ranks` ranks nearest to what it gets on average over them.

    balance_loss: what a log prints of it, 1 where routes are even: experts times the sum, over experts, of
    share times mean probability (arXiv 2101.03961; Megatron-Core, moe_utils.py,
    switch_load_balancing_loss_func). Probabilities are taken to be as the shares; they are flatter, so that
    the spread is the least one that gives it.
    """
    width = sqrt(log(1 + SPREAD**2)) if balance_loss is None else _width(experts, balance_loss)
    shares = _quantiles(experts, width)
    return _typical([_shuffled(shares, seed) for seed in range(ORDERS)], ranks)


def _quantiles(experts: int, width: float) -> tuple[float, ...]:
    normal = NormalDist()
    weights = [exp(width * normal.inv_cdf((e + 0.5) / experts)) for e in range(experts)]
    total = sum(weights)
    return tuple(weight / total for weight in weights)


def _width(experts: int, balance_loss: float) -> float:
    """Of the lognormal whose shares' squares have `balance_loss` for `experts` times their sum."""
    low, high = 0.0, WIDEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        below = experts * sum(share**2 for share in _quantiles(experts, middle)) < balance_loss
        low, high = (middle, high) if below else (low, middle)
    return low


def _typical(draws: Sequence[tuple[float, ...]], ranks: int) -> tuple[float, ...]:
    """The draw whose busiest rank is nearest to the mean over all."""
    loads = [busiest(shares, ranks) for shares in draws]
    usual = fmean(loads)
    return draws[min(range(len(draws)), key=lambda index: abs(loads[index] - usual))]


def busiest(shares: Sequence[float], ranks: int) -> float:
    """Load of the busiest of `ranks` ranks that hold the experts in order, over the mean load."""
    local = len(shares) // ranks
    return max(sum(shares[rank * local : (rank + 1) * local]) for rank in range(ranks)) * ranks


def _shuffled(shares: Sequence[float], seed: int) -> tuple[float, ...]:
    order = list(shares)
    random.Random(seed).shuffle(order)
    return tuple(order)


@lru_cache(maxsize=64)
def repeated(experts: int, top_k: int, ranks: int, words: int) -> tuple[float, ...]:
    """Share of all routes of each expert, where a text is made of `words` distinct tokens in equal parts.

    All copies of a token choose the same top_k experts, any with the same probability. Which they are differs
    from layer to layer: of ORDERS draws, the one whose busiest of `ranks` ranks is nearest to their mean; on
    one rank, what the busiest expert, the second, ... get on average.
    """
    draws = [_repeated(experts, top_k, words, seed) for seed in range(ORDERS)]
    if ranks == 1:
        return tuple(map(fmean, zip(*(sorted(shares, reverse=True) for shares in draws), strict=True)))
    return _typical(draws, ranks)


def _repeated(experts: int, top_k: int, words: int, seed: int) -> tuple[float, ...]:
    draw = random.Random(seed)
    counts = Counter(expert for _ in range(words) for expert in draw.sample(range(experts), top_k))
    return tuple(counts[expert] / (words * top_k) for expert in range(experts))
