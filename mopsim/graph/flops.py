"""Model FLOP: the arithmetic of the network itself, from the same tapes as everything else."""

from functools import lru_cache

from mopsim.graph.experts import experts, router
from mopsim.graph.ffn import ffn
from mopsim.graph.layer import around_latent, mixer
from mopsim.graph.shapes import Shapes
from mopsim.spec.model import ModelSpec


@lru_cache(maxsize=1024)
def _layer_flops(model: ModelSpec, seq_len: int, layer: int, documents: int) -> tuple[tuple[str, float], ...]:
    """Forward FLOP of one layer over one whole sequence."""
    S, k, kind = seq_len, model.num_experts_per_tok, model.layer_kind(layer)
    shapes = Shapes(S, S, documents=documents)
    tapes = [mixer(model, shapes, layer)]
    if kind.routed:
        tapes += [router(model, S, 2, 4), experts(model, (S * k,), 2), around_latent(model, shapes)]
        if model.shared_expert_intermediate_size:
            tapes.append(ffn(model, model.shared_expert_intermediate_size, "shared_experts", shapes))
    elif not kind.bare:
        tapes.append(ffn(model, model.intermediate_size, "dense_ffn", shapes))
    found: dict[str, float] = {}
    for tape in tapes:
        for kernel in tape.kernels:
            key = "attention_core" if kernel.flops else kernel.component
            found[key] = found.get(key, 0.0) + kernel.total_flops
    return tuple(found.items())


@lru_cache(maxsize=1024)
def _flops(model: ModelSpec, seq_len: int, documents: int) -> tuple[tuple[str, float], ...]:
    found: dict[str, float] = {}
    for layers in model.layer_kinds().values():
        for name, flops in _layer_flops(model, seq_len, layers[0], documents):
            found[name] = found.get(name, 0.0) + len(layers) * flops
    head = 2.0 * seq_len * model.hidden_size * model.vocab_size
    for _ in range(model.num_nextn_predict_layers):
        for name, flops in _layer_flops(model, seq_len, model.num_hidden_layers, documents):
            found[name] = found.get(name, 0.0) + flops
        head += 2.0 * seq_len * model.hidden_size * model.vocab_size + 4.0 * seq_len * model.hidden_size**2
    found["vocabulary"] = head
    return tuple((name, flops / seq_len) for name, flops in found.items())


def flops_per_token(model: ModelSpec, seq_len: int, documents: int = 0) -> dict[str, float]:
    """Forward FLOP of one token of a sequence of `seq_len`, by component; causal attention counted half.
    documents: tokens of those that attention does not cross (`TrainSpec.own_document`).

    `attention` holds the projections, `attention_core` the products with keys and values. A training step
    is 3 times the sum (PaLM, arXiv 2204.02311, appendix B), recomputation not counted.
    """
    return dict(_flops(model, seq_len, documents))
