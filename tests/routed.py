"""Routing profiles position by position, as mopsim.spec.routing defines them."""

from bisect import bisect_right

from mopsim.spec.routing import EVEN, RoutingProfile, even_step, hot, thresholds, turn, warm, whole_strides


def first_choice(position: int, num_tokens: int, num_experts: int) -> int:
    """The first expert of token `position` of `num_tokens` in a profile without preference."""
    return position * even_step(num_tokens) % num_tokens * num_experts // num_tokens


def routed_expert(
    routing: RoutingProfile, position: int, num_tokens: int, slot: int, num_experts: int, top_k: int
) -> int:
    """Expert of token `position` (of `num_tokens` on this rank), choice `slot` < top_k, under a profile."""
    if routing in EVEN:
        return (first_choice(position, num_tokens, num_experts) + slot) % num_experts
    skew = hot(routing)
    if skew is None:
        ends = thresholds(routing, num_experts, top_k)
        return min(bisect_right(ends, turn(position) + slot * 2**32), num_experts - 1)
    percent, count = skew
    first = warm(percent, num_tokens)
    if position < first or count >= num_experts:
        return slot % count
    cold = num_experts - count
    return count + (first_choice(position - first, whole_strides(num_tokens - first), cold) + slot) % cold
