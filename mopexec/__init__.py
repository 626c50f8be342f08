"""Train the plan that mopsim chose, for real, on torch.distributed (NCCL or gloo)."""
