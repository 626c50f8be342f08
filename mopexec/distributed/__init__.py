"""Ranks, meshes, collectives, and the seam between a CUDA device and a CPU."""
