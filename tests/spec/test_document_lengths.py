"""How long the document of a token is: the law of a stream of documents that sequences cut."""

import random

import pytest

from mopsim.common.errors import MopError
from mopsim.spec.documents import held, own
from mopsim.spec.training import TrainSpec


def streamed(lengths: list[int], seq_len: int) -> float:
    """Squares of the pieces over their sum, of whole sequences."""
    squares, left, whole = 0, seq_len, 0
    for length in lengths:
        rest = length
        while rest:
            piece = min(rest, left)
            squares, rest, left, whole = squares + piece**2, rest - piece, left - piece, whole + piece
            left = left or seq_len
    return squares / whole


@pytest.mark.parametrize("seq_len", [256, 2048, 8192])
@pytest.mark.parametrize(("mean", "spread"), [(485, 1.0), (485, 1.15), (1333, 0.5), (4096, 0.0)])
def test_the_law_is_that_of_a_stream_that_is_cut(mean: int, spread: float, seq_len: int) -> None:
    draw = random.Random(1)
    factor = 2.718281828459045 ** (-(spread**2) / 2)
    lengths = [max(1, round(mean * factor * draw.lognormvariate(0, spread))) for _ in range(50_000)]
    if spread == 0:  # of one length: begun anywhere in the first
        lengths = [one for at in range(1, mean, 97) for one in (at, *[mean] * 8, mean - at % mean)]
    assert own(f"{mean}/{spread}", seq_len) == pytest.approx(streamed(lengths, seq_len), rel=0.03)


def test_sequences_cut_documents_or_hold_them_whole() -> None:
    assert [own("485/1", length) for length in (2048, 4096, 8192, 16384)] == [797, 995, 1138, 1224]
    assert own("485/1", 2**40) == round(485 * 2.718281828459045)
    assert own("485/1", 1) == 1
    assert own("1000000/1", 512) == pytest.approx(512, rel=0.01)
    assert own("512/0", 2**30) == 512
    assert 1 <= own("1/3", 4096) <= 4096


def test_a_law_is_kept_at_every_length_and_a_number_is_cut() -> None:
    law = TrainSpec(seq_len=4096, global_batch=8, attention_mask="document", document_tokens="485/1")
    assert [law.at_length(one).own_document for one in (2048, 8192)] == [797, 1138]
    assert law.at_length(2048).document_tokens == "485/1"
    assert held("485/1", [1024, 2048]).endswith(": 572 of 1K, 797 of 2K")
    assert held(1500, [1024, 2048]).endswith(": 1,024 of 1K, 1,500 of 2K")
    assert TrainSpec(seq_len=4096, global_batch=8).own_document == 0


@pytest.mark.parametrize(
    "given", ["485", "485/", "/1", "0/1", "485/4", "485/-1", "4e2/1", "485/1/1", "9" * 13]
)
def test_what_is_no_law_is_refused_by_name(given: str) -> None:
    with pytest.raises(MopError, match=r"^document_tokens: .* must be tokens, or MEAN/SPREAD of log-normal"):
        TrainSpec(seq_len=4096, global_batch=8, attention_mask="document", document_tokens=given)


def test_a_law_needs_documents_apart() -> None:
    with pytest.raises(MopError, match="document_tokens: '485/1' needs attention_mask 'document'"):
        TrainSpec(seq_len=4096, global_batch=8, document_tokens="485/1")
