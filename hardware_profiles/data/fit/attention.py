"""Fit of AttentionCurve from kernel rates by sequence length."""

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares

from hardware_profiles.data.fit.tables import Array, Residuals, column, params, round_to
from mopsim.graph.shapes import attended_span
from mopsim.spec.hardware import NARROW_HEAD, WIDE_HEAD


@dataclass(frozen=True)
class AttentionFit:
    forward: float
    backward: float
    seq_half: float
    residuals: Residuals
    source: str
    eight_bit: tuple[float, float] = (1.0, 1.0)
    """How many times as fast with 8-bit operands, forward and backward."""
    held: float = 1.0


#: Heads of 64 over heads of 128, backward, cuDNN on H100, 16384 tokens (arXiv 2407.08608, figure 6).
NARROW_BACKWARD = 433 / 516


def _in_class(row: dict[str, str], heads: str) -> bool:
    """Whether a row is of heads up to 64 (narrow), above 128 (wide), or between."""
    width = int(params(row)["qk_head_dim"])
    return heads == ("narrow" if width <= NARROW_HEAD else "wide" if width > WIDE_HEAD else "")


def _fit(
    rows: list[dict[str, str]], rates: Array, source: str, peak: float, half: float = 0.0
) -> AttentionFit:
    """half: tokens at half rate where the rows are of one length, which cannot tell them."""
    seq = np.array(
        [float(attended_span(params(row)["seq_len"], params(row).get("window", 0))) for row in rows]
    )
    backward = np.array(["backward" in row["params"] for row in rows])

    def errors(x: Array) -> Array:
        share = np.where(backward, x[1], x[0]) * seq / (seq + x[2] * 1e3)
        return np.asarray(np.log(share * peak / rates))

    result = least_squares(
        errors, [0.6, 0.5, half / 1e3 + 1e-9 if half else 1.0], loss="soft_l1", f_scale=0.1,
        bounds=([0.05, 0.05, half / 1e3], [1.0, 1.0, half / 1e3 + 1e-6 if half else 50.0]),
    )  # fmt: skip
    forward, back, fitted = (float(value) for value in result.x)
    return AttentionFit(
        round_to(forward), round_to(back), round_to(fitted * 1e3, 3), Residuals.of(errors(result.x)), source
    )


def fit_cudnn(rows: list[dict[str, str]], gpu: str, peak: float, heads: str) -> AttentionFit:
    """cuDNN's training kernels by length: heads of 128, of 64 (narrow, in windows too), or of 192 and more
    (wide), the causal half counted.

    8-bit operands: the mean ratio of MXFP8 to bf16 rates of one shape, of FP8 where MXFP8 was not run.
    """
    mine = [row for row in rows if row["gpu"] == gpu and row["system"] == "cuDNN SDPA"]
    mine = [row for row in mine if _in_class(row, heads)]
    rates: dict[str, dict[tuple[object, ...], float]] = {"bf16": {}, "fp8": {}, "mxfp8": {}}
    for row in mine:
        shape = params(row)
        rates[shape["precision"]][shape["model"], shape["pass_"], shape["seq_len"]] = float(row["value"])
    narrow = rates["mxfp8"] or rates["fp8"]
    widths = {"": "of 128", "wide": "of 192 and more", "narrow": "of 64, windows of 128 and 1024 too"}
    source = f"cuDNN SDPA on {gpu}, causal, heads {widths[heads]}, 2048 to 32768 tokens (components.csv)"
    bf16 = [row for row in mine if params(row)["precision"] == "bf16"]
    fit = _fit(bf16, column(bf16, "value"), source, peak)
    gains = []
    for name in ("forward", "backward"):
        ratios = [narrow[key] / rates["bf16"][key] for key in narrow if key[1] == name]
        gains.append(round_to(float(np.mean(ratios)), 3) if ratios else 1.0)
    return replace(fit, eight_bit=(gains[0], gains[1]))


def fit_aiter(rows: list[dict[str, str]], peaks: dict[str, float]) -> dict[str, AttentionFit]:
    """AITER's kernels of CDNA3 and CDNA4, causal half counted, by machine and class of heads; narrow and wide
    heads of MI300X at one length. On MI355X narrow heads were timed forward alone: the backward keeps its
    share of that of heads of 128 on MI300X. The backward of heads of 128 there is the middle of two sources:
    one of as many key heads by length, one of grouped queries at 8192 tokens with sums of 32 bits, which
    Transformer Engine takes.
    """
    mi300x, mi355x = "mi300x-192g", "mi355x-288g"
    widths = {"": "of 128", "narrow": "of 64", "wide": "of 192 and 128"}
    fits: dict[str, AttentionFit] = {}
    for gpu, heads in ((mi300x, ""), (mi300x, "narrow"), (mi300x, "wide"), (mi355x, ""), (mi355x, "narrow")):
        mine = [
            row for row in rows if row["gpu"] == gpu and row["system"] == "AITER" and _in_class(row, heads)
        ]
        lengths = {params(row)["seq_len"] for row in mine}
        half = fits[gpu].seq_half if len(lengths) == 1 else 0.0
        source = f"AITER on {gpu}, causal, heads {widths[heads]} (components.csv)"
        fit = _fit(mine, column(mine, "value"), source, peaks[gpu], half)
        fits[f"{gpu}_{heads}" if heads else gpu] = fit
    sums = next(row for row in rows if row["gpu"] == mi355x and row["system"] == "AITER, sums of 32 bits")
    curve, tokens = fits[mi355x], params(sums)["seq_len"]
    own = peaks[mi355x] * curve.backward * tokens / (tokens + curve.seq_half)
    middle = curve.backward * (1 + float(sums["value"]) / own) / 2
    share = fits[f"{mi300x}_narrow"].backward / fits[mi300x].backward
    fits[mi355x] = replace(fits[mi355x], backward=round_to(middle))
    fits[f"{mi355x}_narrow"] = replace(fits[f"{mi355x}_narrow"], backward=round_to(middle * share))
    return fits


def fit_hopper(rows: list[dict[str, str]], peak: float) -> AttentionFit:
    """cuDNN on Hopper, 128 heads of 192/128. The mask is not stated: rates taken as they are."""
    mine = [row for row in rows if row["gpu"] == "hopper-unspecified"]
    source = "cuDNN SDPA on Hopper, 128 heads of 192 and 128, 4096 and 16384 tokens (components.csv)"
    return _fit(mine, column(mine, "value"), source, peak)


def fit_blackwell(rows: list[dict[str, str]], peak: float, wide: bool) -> AttentionFit:
    """B200 table, 16 heads and more, heads of 128, or of 192 and 128 (wide).

    Its rates count the masked half too (1.2 of peak): halved here.
    """
    mine = [
        row for row in rows if row["gpu"] == "b200-sxm-192g" and int(params(row).get("head_num", 0)) >= 16
    ]
    mine = [row for row in mine if (int(params(row)["qk_head_dim"]) > WIDE_HEAD) == wide]
    heads = "of 192 and 128" if wide else "of 128"
    source = f"B200 table of components.csv, 16 heads and more {heads}, halved: it counts the masked half too"
    return _fit(mine, column(mine, "value") / 2, source, peak)
