"""How long the documents of packed sequences are, where attention does not cross them: one value.

A number: tokens of the document that a token is in, on average over tokens, as the sequences hold them (the
documents' lengths squared, summed, over their sum). Or `MEAN/SPREAD`, a law of the data: documents of MEAN
tokens, on average over documents, whose logarithm deviates by SPREAD (log-normal), packed one behind the
other and cut every seq_len tokens. 0: not known.

Of such a stream the lengths L have the mean m, and two tokens at a distance u are of one document with the
probability E[(L - u)+] / m. A token of a sequence of T tokens is then in a document of

    2 int_0^T (1 - u / T) E[(L - u)+] / m du = (E[L^2 - L^3 / 3T; L <= T] + E[T L - T^2 / 3; L > T]) / m

tokens on average: m e^(SPREAD^2) where sequences are long, T where they are short.
"""

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from mopsim.common.errors import Rules
from mopsim.common.units import format_count

Documents = int | str
_LAW = re.compile(r"([1-9][0-9]{0,12})/([0-9](?:\.[0-9]{1,6})?)")
LONGEST, WIDEST = 2**40, 3
"""Of a law: the mean, tokens; the deviation of the logarithm."""
RULE = (
    f"must be tokens, or MEAN/SPREAD of log-normal lengths (MEAN whole, at most {LONGEST}; SPREAD from 0 to "
    f"{WIDEST} with at most six decimals), as 485/1.15; 0: attention crosses documents"
)


def law(documents: Documents) -> tuple[int, float] | None:
    """(mean, spread) of `MEAN/SPREAD`, None of a number."""
    match = _LAW.fullmatch(documents) if isinstance(documents, str) else None
    return (int(match.group(1)), float(match.group(2))) if match else None


def rules(documents: Documents, seq_len: int) -> Rules:
    """What must hold of the value for sequences of `seq_len` tokens."""
    if isinstance(documents, int):
        held = 0 <= documents <= seq_len
        yield held, "document_tokens", f"must lie between 0 and seq_len {seq_len}"
        return
    found = law(documents)
    known = found is not None and found[0] <= LONGEST and found[1] <= WIDEST
    yield known, "document_tokens", RULE


def at_length(documents: Documents, seq_len: int) -> Documents:
    """The same value for sequences of another length, which cut the documents that are longer."""
    return min(documents, seq_len) if isinstance(documents, int) else documents


def own(documents: Documents, seq_len: int) -> int:
    """Tokens of the document that a token is in, on average over the tokens of a sequence; 0: not known."""
    found = law(documents)
    return _own(*found, seq_len) if found else int(documents)


def number(documents: Documents, seq_len: int) -> float:
    """Documents of a sequence of `seq_len` tokens, 1 where it is not known: of a law as many as its mean has
    room for, else as if all were as long as a token's own is on average, so at least."""
    found = law(documents)
    return max(1.0, seq_len / (found[0] if found else int(documents) or seq_len))


@lru_cache(maxsize=1024)
def _own(mean: int, spread: float, seq_len: int) -> int:
    centre, cut = math.log(mean) - spread**2 / 2, math.log(seq_len)

    def moments(power: int) -> tuple[float, float]:
        """E[L^power; L <= T], E[L^power; L > T]."""
        whole = math.exp(power * centre + (power * spread) ** 2 / 2)
        if spread == 0:
            return (whole, 0.0) if mean <= seq_len else (0.0, whole)
        at = (cut - centre) / spread - power * spread
        below, above = (whole * math.erfc(side * at / math.sqrt(2)) / 2 for side in (-1, 1))
        return below, above

    squares, cubes, (_, tokens), (_, number) = moments(2)[0], moments(3)[0], moments(1), moments(0)
    sum_of_squares = squares - cubes / (3 * seq_len) + seq_len * tokens - seq_len**2 * number / 3
    return min(seq_len, max(1, round(sum_of_squares / mean)))


def training_fields(documents: Documents) -> dict[str, Any]:
    """Of a training whose documents are apart and so long; where 0 is said attention crosses them."""
    return {"attention_mask": "document" if documents else "causal", "document_tokens": documents}


def held(documents: Documents, lengths: Sequence[int]) -> str:
    """What a sweep over sequence lengths holds, and what of it each length cuts."""
    each = [f"{own(at_length(documents, one), one):,} of {format_count(one)}" for one in lengths]
    has = "tokens of a token's document, on average, in sequences"
    return f"document_tokens {documents}: {has}: {', '.join(each)}"
