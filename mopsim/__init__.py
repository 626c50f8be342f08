"""Simulate, choose and size parallelism strategies for Mixture-of-Experts training. Never imports torch."""

__version__ = "0.1.0"
