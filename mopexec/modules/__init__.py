"""The `fully_shard` runtime: torch modules under FSDP2."""
