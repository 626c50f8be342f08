"""Logical tensors, matmuls and activations of each layer, from a ModelSpec: the one source of every count."""

from mopsim.graph.flops import flops_per_token
from mopsim.spec.tensors import Tensor, active_params, buffers, parameters, tensors, total_params

__all__ = ["Tensor", "active_params", "buffers", "flops_per_token", "parameters", "tensors", "total_params"]
