"""Memory of a device or a host as a distribution: tensors that are uncertain, and causes on top of them of
which only bounds are published."""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np

from mopsim.intervals.spread import CLOSE, SURE, Facts, Spread, of_peak_memory

SHARES = (np.arange(64) + 0.5) / 64
"""Of the causes on top: as likely one share of their bound as another, since no more is known."""


@dataclass(frozen=True)
class PeakSpread:
    """Bytes: tensors x measured / predicted, and up to `above` on top."""

    tensors: float
    above: float
    error: Spread

    def below(self, limit: float) -> float:
        """Probability that no more than `limit` bytes are needed."""
        left = limit - SHARES * self.above
        ratios = np.log(np.maximum(left, 1e-9) / max(self.tensors, 1e-12))
        return float(np.mean(self.error.below(ratios)))

    @property
    def as_described(self) -> "PeakSpread":
        """If the program is."""
        return PeakSpread(self.tensors, self.above, self.error.as_described)

    def enough(self, confidence: float = 0.0) -> float:
        """Bytes that hold the program as good as surely (SURE) if it is as described, and with a probability
        of `confidence` if it may not be."""
        described = self.as_described.quantile(SURE)
        return max(described, self.quantile(confidence)) if confidence else described

    def quantile(self, probability: float) -> float:
        """Bytes that are enough with this probability."""
        low, high = 0.0, self.tensors * float(np.exp(self.error.quantile(1 - CLOSE))) + self.above
        while high - low > max(1.0, CLOSE * high):
            middle = (low + high) / 2
            low, high = (low, middle) if self.below(middle) >= probability else (middle, high)
        return high


def on_top(probability: float) -> float:
    """Share of what may come on top that is enough with this probability."""
    return float(SHARES[ceil(probability * len(SHARES)) - 1])


@lru_cache(maxsize=4096)
def least_share(facts: Facts, above: float, confidence: float = 0.0) -> float:
    """How many times its peak of tensors a device needs to hold a program that is as described as good as
    surely (SURE), and one that may not be with a probability of `confidence`. above: the part of the peak
    that comes on top, at most."""
    return PeakSpread(1e12, above * 1e12, of_peak_memory(facts)).enough(confidence) / 1e12
