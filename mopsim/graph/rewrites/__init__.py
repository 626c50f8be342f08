"""Rewrites of a layer's tape, kernels to kernels: what eager torch composes, recomputation, casts, slices,
chunks."""
