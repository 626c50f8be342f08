"""A training run: from the plan to its runtime, data, steps, checkpoints and metrics."""
