"""The runtimes of torch modules under autograd: `fully_shard` (FSDP2), and `split_modules` (ZeRO-1)."""
