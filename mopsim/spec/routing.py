"""Routing profiles: how tokens choose experts where no router decides (simulation and dry run).

A profile is one value: `balanced`; `forced` (balanced too, by the routes that the program makes itself for
benchmarks: `balanced_routes` of its stack says whether a token's experts lie together); `r/h` (r % of the
token positions go to the h hot experts); `zipf:s` (expert e is chosen in proportion to (e + 1)^-s); or a
measured histogram: each expert's share of all routes.

Without preference the first expert of position i of N is floor((A i mod N) E / N), A prime to N, and the
others are those after it: i -> A i mod N is a permutation, so all N positions fill the experts evenly, and so
do those of every stride that divides N. Those of another stride are off by a few rows, as A/N is near the
golden ratio. Counting up, (i mod E), a stride that shares a factor with E never meets some experts. In `r/h`
the first r % of positions choose j mod h (so experts below min(h, top_k) only), the others evenly among the E
- h after them (arXiv 2609.14306; LLEP's profiles). Shares: see `thresholds`.
"""

import math
import re
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate, pairwise

from mopsim.common.errors import require
from mopsim.spec.model import ModelSpec

RoutingProfile = str | tuple[float, ...]

EVEN = ("balanced", "forced")
"""Profiles in which every expert gets its share of the routes."""
_SKEW = re.compile(r"([0-9]{1,3})/[1-9][0-9]{0,8}")
_ZIPF = re.compile(r"zipf:([0-9]{1,2}(?:\.[0-9]{1,6})?)")
_TURN = 2**32
_STRIDE = 2654435769
"""2^32 over the golden ratio: multiples of it, modulo 2^32, spread evenly in every run and every stride
(Knuth, The Art of Computer Programming 3, 6.4)."""
_NEAREST, _STRIDES = 16, 16
"""Numbers on either side of the golden ratio's that are tried, and strides that are to be even."""
_SUM_TOLERANCE = 1e-3


def in_words(routing: RoutingProfile) -> str:
    """A profile as it is named to people: the shares of a measurement are not spelled out."""
    return routing if isinstance(routing, str) else "measured shares"


def hot(routing: RoutingProfile) -> tuple[int, int] | None:
    """(r, h) of an `r/h` profile, None of another."""
    if not isinstance(routing, str) or not _SKEW.fullmatch(routing):
        return None
    percent, experts = routing.split("/")
    return int(percent), int(experts)


def worst(model: ModelSpec, degree: int) -> RoutingProfile:
    """The profile that no router exceeds: one of `degree` ranks gets every route, or, where it holds fewer
    experts than a token chooses, each of its experts once for every token.
    """
    experts, top_k = model.num_local_experts, model.num_experts_per_tok
    held = experts // degree
    if degree == 1:
        return "balanced"
    if held >= top_k:
        return f"100/{held}"
    others = (1 - held / top_k) / (experts - held)
    return (1 / top_k,) * held + (others,) * (experts - held)


def check(routing: RoutingProfile) -> None:
    """Raise SpecError where the value is no profile."""
    if isinstance(routing, str):
        skew = hot(routing)
        known = routing in EVEN or _ZIPF.fullmatch(routing) or (skew is not None and skew[0] <= 100)
        named = "must be 'balanced', 'forced', 'r/h' with r a percentage and h a number of experts"
        require(bool(known), "routing", routing, f"{named}, 'zipf:s' with an exponent s, or a list of shares")
        return
    for index, share in enumerate(routing):
        require(
            math.isfinite(share) and share >= 0, f"routing[{index}]", share, "must be a share, at least 0"
        )
    total = sum(routing)
    require(abs(total - 1) <= _SUM_TOLERANCE, "routing", total, "is the sum of the shares, which must be 1")


def check_model(routing: RoutingProfile, model: ModelSpec, field: str = "training.routing") -> None:
    """Raise SpecError where the profile does not fit the model's experts."""
    experts, top_k = model.num_local_experts, model.num_experts_per_tok
    skew = hot(routing)
    if skew is not None:
        rule = f"has more hot experts than num_local_experts {experts}"
        require(skew[1] <= experts, field, routing, rule)
    if isinstance(routing, str):
        return
    rule = f"shares, not one for each of num_local_experts {experts}"
    require(len(routing) == experts, field, len(routing), rule)
    for index, share in enumerate(routing):
        rule = f"is more than 1 / num_experts_per_tok {top_k}: a token chooses an expert once"
        require(share * top_k <= 1 + top_k * _SUM_TOLERANCE, f"{field}[{index}]", share, rule)


def shares(routing: RoutingProfile, experts: int, top_k: int) -> tuple[float, ...]:
    """Share of all routes that each expert gets, of a `zipf:s` profile or a histogram; sums to 1.

    None is above 1/k, as a token chooses an expert once: what Zipf's law gives an expert beyond that goes to
    the others in their proportion.
    """
    if not isinstance(routing, str):
        return _capped(tuple(routing), 1 / top_k)
    match = _ZIPF.fullmatch(routing)
    assert match is not None, f"{routing} has no shares"
    return _capped(tuple((e + 1.0) ** -float(match.group(1)) for e in range(experts)), 1 / top_k)


def _capped(weights: tuple[float, ...], cap: float) -> tuple[float, ...]:
    full: set[int] = set()
    while True:
        rest = sum(weight for e, weight in enumerate(weights) if e not in full)
        scale = (1 - cap * len(full)) / rest if rest else 0.0
        over = {e for e, weight in enumerate(weights) if e not in full and weight * scale > cap * (1 + 1e-12)}
        if not over:
            return tuple(cap if e in full else weight * scale for e, weight in enumerate(weights))
        full |= over


@lru_cache(maxsize=256)
def thresholds(routing: RoutingProfile, experts: int, top_k: int) -> tuple[int, ...]:
    """Where each expert's part of the k turns of 2^32 ends: choice j of a position lies in turn j."""
    ends = [round(end * top_k * _TURN) for end in accumulate(shares(routing, experts, top_k))]
    return (*ends[:-1], top_k * _TURN)


def turn(position: int) -> int:
    """Where in every turn a token position lies: systematic sampling, so its k choices differ."""
    return position * _STRIDE % _TURN


@lru_cache(maxsize=1024)
def even_step(num_tokens: int) -> int:
    """A of the first expert: prime to the tokens and near them over the golden ratio. Of the nearest, that
    whose multiples K A up to _STRIDES fill the circle best: no large quotient in the continued fraction of
    K A / N."""
    near = round(num_tokens * _STRIDE / _TURN)
    prime = [one for one in range(max(1, near - _NEAREST), near + _NEAREST) if math.gcd(one, num_tokens) == 1]
    strides = [one for one in range(2, _STRIDES + 1) if num_tokens % one]
    return min(
        prime or [1], key=lambda one: max((_quotient(k * one, num_tokens) for k in strides), default=0)
    )


def _quotient(numerator: int, denominator: int) -> int:
    """The largest quotient in the continued fraction of the part below 1."""
    largest, over, under = 0, denominator, numerator % denominator
    while under:
        quotient, rest = divmod(over, under)
        largest = max(largest, quotient)
        over, under = under, rest
    return largest


def whole_strides(num_tokens: int) -> int:
    """N of the first expert for so many that the profile leaves over: rounded up, so that strides of
    2, 4, 8 and 16 divide them."""
    return -(-num_tokens // 16) * 16


def warm(percent: int, num_tokens: int) -> int:
    """Positions of an `r/h` profile that choose hot experts: the first r %, rounded up."""
    return -(-percent * num_tokens // 100)


@lru_cache(maxsize=4096)
def routing_counts(
    routing: RoutingProfile, num_tokens: int, chunks: int, index: int, num_experts: int, top_k: int
) -> tuple[int, ...]:
    """Routes to each expert from strided chunk `index` (positions index, index + chunks, ...) of one rank.

    Sums to the chunk's tokens times top_k.
    """
    positions = range(index, num_tokens, chunks)
    skew = hot(routing)
    if routing in EVEN:
        return _evenly(positions, num_tokens, num_experts, top_k)
    if skew is None:
        return _by_share(routing, positions, num_experts, top_k)
    percent, count = skew
    first = num_tokens if count >= num_experts else warm(percent, num_tokens)
    hits = len(range(index, min(first, num_tokens), chunks))
    front = [hits * len(range(e, top_k, count)) for e in range(min(count, num_experts))]
    if hits == len(positions):
        return (*front, *(0 for _ in range(num_experts - count)))
    cold = positions[hits:]
    after = range(cold.start - first, num_tokens - first, chunks)
    return (*front, *_evenly(after, whole_strides(num_tokens - first), num_experts - count, top_k))


def _evenly(positions: range, num_tokens: int, experts: int, top_k: int) -> tuple[int, ...]:
    """Counts of the first expert and the k - 1 after it, from a stride of positions, in closed form."""
    if not len(positions):
        return (0,) * experts
    step = even_step(num_tokens)
    begin, by = positions.start * step % num_tokens, positions.step * step % num_tokens
    ends = [-(-e * num_tokens // experts) for e in range(experts + 1)]
    apart = math.gcd(by, num_tokens)
    if len(positions) * apart == num_tokens:  # once around: equally spaced
        least = begin % apart
        below = [max(0, -((least - end) // apart)) for end in ends]
    else:
        below = [_below(end, len(positions), begin, by, num_tokens) for end in ends]
    starts = [upto - before for before, upto in pairwise(below)]
    whole, rest = divmod(top_k, experts)
    total, wide = sum(starts), starts * 2
    return tuple(whole * total + sum(wide[e + experts - rest + 1 : e + experts + 1]) for e in range(experts))


def _below(end: int, count: int, begin: int, by: int, modulus: int) -> int:
    """How many of (begin + by m) mod modulus, m < count, are below `end` (at most the modulus): a value v has
    floor(v / modulus) - floor((v - end) / modulus) = 1 there, else 0."""
    start = begin + modulus
    return _floor_sum(count, modulus, by, start) - _floor_sum(count, modulus, by, start - end)


def _floor_sum(count: int, modulus: int, by: int, begin: int) -> int:
    """The sum of floor((by m + begin) / modulus) over m < count, all at least 0, in O(log modulus): points of
    the lattice below a line, whose axes are swapped as in Euclid's algorithm."""
    total = 0
    while True:
        total += count * (count - 1) // 2 * (by // modulus) + count * (begin // modulus)
        by, begin = by % modulus, begin % modulus
        top = by * count + begin
        if top < modulus:
            return total
        count, begin = divmod(top, modulus)
        modulus, by = by, modulus


def _by_share(routing: RoutingProfile, positions: range, experts: int, top_k: int) -> tuple[int, ...]:
    """Counts of `thresholds`, in closed form: how many positions lie in each expert's part of a turn."""
    ends = thresholds(routing, experts, top_k)
    begin, by = turn(positions.start), turn(positions.step)
    counts = [0] * experts
    for slot in range(top_k):
        base, before = slot * _TURN, 0
        for e in range(bisect_right(ends, base), experts):
            upto = _below(min(ends[e] - base, _TURN), len(positions), begin, by, _TURN)
            counts[e] += upto - before
            before = upto
            if upto == len(positions):
                break
    return tuple(counts)
