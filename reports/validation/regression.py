"""The baseline a simulator must beat: six nonnegative coefficients on what a spreadsheet knows of a run."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from mopsim.graph import active_params, flops_per_token, total_params
from mopsim.validate.case import Case
from mopsim.validate.scored import Scored, trusted
from mopsim.validate.scoring import software


def features(case: Case) -> list[float]:
    """Per rank and step, over the machine's peaks (seconds), but messages: a count.

    flops: model FLOP, with recompute, over peak and the pipeline's filled share. weight_bytes: parameters
    read in three
    passes. activation_bytes: 34 H bytes a token and layer. group_bytes: tensor, sequence and expert
    exchanges.
    gradient_bytes: reduction and gathering of parameters. messages: collectives and layers started.
    """
    model, s, training, hardware = case.network(), case.resolved(), case.training, case.profile()
    micro = training.num_microbatches(s)
    layers = model.num_hidden_layers / s.pipeline.pipeline_parallel
    tokens = training.tokens_per_rank(s) / s.dense.tensor_parallel * micro
    recompute = "selective" if s.activations.save_ops else s.activations.recompute
    passes = {"none": 3.0, "selective": 3.2, "full": 4.0}[recompute]
    flops = (
        passes
        * sum(flops_per_token(model, training.seq_len, training.own_document).values())
        * training.global_batch
        * training.seq_len
    )
    filled = (
        micro
        * s.pipeline.virtual_stages
        / (micro * s.pipeline.virtual_stages + s.pipeline.pipeline_parallel - 1)
    )
    peak = max(curve.peak.si for curve in hardware.device.matmul if curve.dtype == _dtype(case))
    held = (
        total_params(model)
        / s.pipeline.pipeline_parallel
        / s.dense.tensor_parallel
        / s.experts.expert_parallel
    )
    held = max(held, active_params(model) / s.pipeline.pipeline_parallel / s.dense.tensor_parallel)
    hidden = 2.0 * tokens * model.hidden_size * layers
    exchanged = hidden * (8 * (s.dense.tensor_parallel > 1) + 4 * (s.attention.context_parallel > 1))
    exchanged += hidden * 4 * model.num_experts_per_tok * (s.experts.expert_parallel > 1)
    spread = s.stage_ranks > hardware.scale_up_size
    fabric = (hardware.scale_out if spread else hardware.scale_up).peak.si
    rounds = 3 * micro if s.dense.zero == 3 else 2
    return [
        flops / s.world_size / filled / peak,
        6.0 * held * micro / hardware.device.memory_bandwidth.si,
        17.0 * hidden / hardware.device.memory_bandwidth.si,
        exchanged / hardware.scale_up.peak.si,
        2.0 * held * rounds * (s.data_groups > 1) / fabric,
        layers * micro * s.pipeline.virtual_stages + s.pipeline.pipeline_parallel,
    ]


def _dtype(case: Case) -> str:
    precision = case.strategy.precision
    return precision.compute if precision.matmul == "compute" else precision.matmul


def held_out(
    cases: Sequence[Case], models: Sequence[str], measured: Sequence[float], usable: Sequence[bool]
) -> list[float | None]:
    """Predicted seconds of each case by coefficients fitted on all other networks; None where there are
    none. usable: whether a case may be fitted on, as in calibration.held_out."""
    design = np.array([features(case) for case in cases], dtype=float)
    seconds = np.array(measured, dtype=float)
    found: dict[str, NDArray[np.float64] | None] = {}
    for model in set(models):
        others = [i for i, name in enumerate(models) if name != model and usable[i]]
        found[model] = (
            _solve(design[others], seconds[others], [models[i] for i in others]) if others else None
        )
    rows = [found[model] for model in models]
    return [None if c is None else float(design[i] @ c) for i, c in enumerate(rows)]


def _solve(
    design: NDArray[np.float64], seconds: NDArray[np.float64], models: Sequence[str]
) -> NDArray[np.float64]:
    counts = Counter(models)
    weight = np.sqrt([1.0 / counts[model] for model in models])
    scale = np.maximum(design.max(axis=0), 1e-30)
    found, _ = nnls(design / scale / seconds[:, None] * weight[:, None], weight)
    return np.asarray(found / scale)


def of_scored(scored: Sequence[Scored]) -> dict[str, float]:
    """Relative error of the step time by case, fitted per source and hardware on other networks as the
    calibration is."""
    groups: dict[tuple[str, str], list[Scored]] = defaultdict(list)
    for one in scored:
        if one.case.measured.step_time:
            groups[software(one.case)].append(one)
    found = {}
    for members in groups.values():
        cases = [one.case for one in members]
        measured = [case.measured.step_time or 0.0 for case in cases]
        lines = held_out(
            cases, [case.identity() for case in cases], measured, [trusted(case) for case in cases]
        )
        for case, line, seconds in zip(cases, lines, measured, strict=True):
            if line is not None:
                found[case.id] = line / seconds - 1.0
    return found
