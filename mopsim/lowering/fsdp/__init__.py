"""The `fully_shard` schedule: torch FSDP2 around an autograd model (mopexec.modules,
mopexec.model)."""
