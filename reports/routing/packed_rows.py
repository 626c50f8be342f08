"""Documents of the longest packed row of a step: lengths drawn, packed by first fit, many steps drawn.

Megatron-Bridge's card of GPT-OSS 20B has 83.333 documents in a row of 32768 tokens, so 385 tokens each beside
what no document fills; the deviation of ln(length) is that of the same text in rows of 8192 (736 tokens in
the document of a token, 385 exp(0.81^2) but for what rows cut). What fills a row up is a document too.
"""

import numpy as np

MEAN, DEVIATION, ROW, DOCUMENTS, STEPS, SEED = 385.0, 0.81, 2048, 20_000, 4_000, 0


def packed(lengths: np.ndarray, room: int) -> np.ndarray:
    """Documents of each row: every document goes to the first row that has room for it."""
    left, held, rows = np.zeros(len(lengths)), np.zeros(len(lengths), int), 0
    for length in lengths:
        fits = left[:rows] >= length
        row = int(np.argmax(fits)) if fits.any() else rows
        if row == rows:
            left[row], rows = room, rows + 1
        left[row] -= length
        held[row] += 1
    return held[:rows]


def main() -> None:
    draw = np.random.default_rng(SEED)
    lengths = np.ceil(draw.lognormal(np.log(MEAN) - DEVIATION**2 / 2, DEVIATION, DOCUMENTS)).clip(max=ROW)
    held = packed(lengths, ROW) + 1
    print(f"a row of {ROW}: {held.mean():.1f}")
    for rows in (16, 32):
        longest = draw.choice(held, (STEPS, rows)).max(axis=1)
        print(f"the longest of {rows}: {longest.mean():.1f}")


if __name__ == "__main__":
    main()
