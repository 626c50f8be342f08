"""The value that works, beside the one that is refused."""

_TRIES = 2000


def near_divisors(total: int, value: int) -> str:
    """'; 4 or 8 will do': the divisors of `total` nearest to `value`, which is none; '' if none is near."""
    most = min(value, total)
    below = next((one for one in range(most, max(0, most - _TRIES), -1) if total % one == 0), 0)
    above = next((one for one in range(value + 1, min(total, value + _TRIES) + 1) if total % one == 0), 0)
    return _said(below, above)


def near_multiples(value: int, step: int) -> str:
    """'; 48 or 64 will do': the multiples of `step` about `value`, which is none."""
    below = value // step * step
    return _said(below, below + step)


def near_batches(batch: int, ranks: int) -> str:
    """'; 32 or 64 will do': batches about one that does not divide over the ranks; fewer than ranks share a
    sequence. '' where it does."""
    if batch % ranks == 0 or ranks % batch == 0:
        return ""
    return near_multiples(batch, ranks) if batch > ranks else near_divisors(ranks, batch)


def _said(*values: int) -> str:
    fit = [f"{one}" for one in values if one]
    return f"; {' or '.join(fit)} will do" if fit else ""
