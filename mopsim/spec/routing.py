"""Routing profiles: how tokens choose experts where no router decides (simulation and dry run).

A profile is one value: `balanced`; `r/h` (r % of the token positions go to the h hot experts); `zipf:s`
(expert e is chosen in proportion to (e + 1)^-s); or a measured histogram: each expert's share of all routes.
"""

import math
import re
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate

from mopsim.common.errors import require
from mopsim.spec.model import ModelSpec

RoutingProfile = str | tuple[float, ...]

_SKEW = re.compile(r"([0-9]{1,3})/[1-9][0-9]{0,8}")
_ZIPF = re.compile(r"zipf:([0-9]{1,2}(?:\.[0-9]{1,6})?)")
_TURN = 2**32
_STRIDE = 2654435769
"""2^32 over the golden ratio: multiples of it, modulo 2^32, spread evenly in every run and every stride
(Knuth, The Art of Computer Programming 3, 6.4)."""
_SUM_TOLERANCE = 1e-3


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
        known = routing == "balanced" or _ZIPF.fullmatch(routing) or (skew is not None and skew[0] <= 100)
        rule = "must be 'balanced', 'r/h' with r a percentage and h a number of experts, 'zipf:s' with an"
        require(bool(known), "routing", routing, f"{rule} exponent s, or a list of shares")
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


def routed_expert(
    routing: RoutingProfile, position: int, num_tokens: int, slot: int, num_experts: int, top_k: int
) -> int:
    """Expert of token `position` (of `num_tokens` on this rank), choice `slot` < top_k, under a profile.

    balanced: (i + j) mod E; no rank gets more than E/N over the mean of N tokens, nothing where E divides N
    (every rank begins with the same experts, which get the remainder). r/h: the first r % of positions
    choose j mod h (so experts below min(h, top_k) only), the others h + ((i + j) mod (E - h))
    (arXiv 2609.14306; LLEP's profiles). Shares: see `thresholds`.
    """
    if routing == "balanced":
        return (position + slot) % num_experts
    skew = hot(routing)
    if skew is None:
        ends = thresholds(routing, num_experts, top_k)
        return min(bisect_right(ends, turn(position) + slot * _TURN), num_experts - 1)
    percent, count = skew
    if position * 100 < percent * num_tokens or count >= num_experts:
        return slot % count
    return count + (position + slot) % (num_experts - count)


@lru_cache(maxsize=4096)
def routing_counts(
    routing: RoutingProfile, num_tokens: int, chunks: int, index: int, num_experts: int, top_k: int
) -> tuple[int, ...]:
    """Routes to each expert from strided chunk `index` (positions index, index + chunks, ...) of one rank.

    Sums to the chunk's tokens times top_k.
    """
    positions = range(index, num_tokens, chunks)
    skew = hot(routing)
    if routing == "balanced":
        return _in_turn(positions, num_experts, top_k)
    if skew is None:
        return _by_share(routing, positions, num_experts, top_k)
    percent, count = skew
    first = num_tokens if count >= num_experts else -(-percent * num_tokens // 100)
    cold = positions[len(range(index, min(first, num_tokens), chunks)) :]
    warm = len(positions) - len(cold)
    front = [warm * len(range(e, top_k, count)) for e in range(min(count, num_experts))]
    if not len(cold):
        return (*front, *(0 for _ in range(num_experts - count)))
    return (*front, *_in_turn(cold, num_experts - count, top_k))


def _in_turn(positions: range, experts: int, top_k: int) -> tuple[int, ...]:
    """Counts where position i takes experts (i + j) mod E for j < k, in O(E k)."""
    period = experts // math.gcd(positions.step, experts)
    full, rest = divmod(len(positions), period)
    starts = [0] * experts
    for i in range(period):
        starts[(positions.start + i * positions.step) % experts] += full + (i < rest)
    return tuple(sum(starts[(e - j) % experts] for j in range(top_k)) for e in range(experts))


def _by_share(routing: RoutingProfile, positions: range, experts: int, top_k: int) -> tuple[int, ...]:
    """Counts of `thresholds`: every turn is searched once with the sorted positions."""
    ends = thresholds(routing, experts, top_k)
    turns = sorted(turn(position) for position in positions)
    counts = [0] * experts
    for slot in range(top_k):
        base, before = slot * _TURN, 0
        for e, end in enumerate(ends):
            if end <= base:
                continue
            upto = bisect_right(turns, end - base - 1)
            counts[e] += upto - before
            before = upto
            if upto == len(turns):
                break
    return tuple(counts)
