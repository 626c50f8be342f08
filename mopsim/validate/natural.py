"""Routing of pretrained routers on real tokens, where a row says `natural` and nobody counted.

What is published is how much more the busiest rank gets than the mean one. Experts' shares are taken to be
lognormal, and experts to lie on ranks in no order; one spread of the shares then gives the busiest rank's
load at any degree of expert parallelism.
"""

import random
from functools import lru_cache
from math import exp, log, sqrt
from statistics import NormalDist

SPREAD = 0.78
"""Standard deviation of an expert's share over the mean share. Without balancing, the busiest rank of MoE
networks of 106 to 671 billion parameters, in training and prefill on rack-scale nodes, got 1.30 to 4.01 times
the mean (UltraEP, arXiv 2606.04101); 0.78 gives their middle by ratio, 2.28, on 64 ranks of 4 experts, the
degree being assumed. On 8 ranks of 16 it gives 1.3. The Gini coefficient is 0.37: arXiv 2605.20982 found 0.15
to 0.24 and more on text and 0.29 to 0.38 on mock tokens, Qwen3-30B between its other networks."""
ORDER = 4
"""Seed of the order of the experts on the ranks: one whose busiest ranks, of 128 and of 256 experts on 8, get
what they do on average over orders (1.3)."""


@lru_cache(maxsize=64)
def natural(experts: int) -> tuple[float, ...]:
    """Share of all routes of each expert: quantiles of the lognormal, shuffled."""
    width = sqrt(log(1 + SPREAD**2))
    normal = NormalDist()
    weights = [exp(width * normal.inv_cdf((e + 0.5) / experts)) for e in range(experts)]
    random.Random(ORDER).shuffle(weights)
    total = sum(weights)
    return tuple(weight / total for weight in weights)
