"""Machine types, one YAML each. Regenerate all but cpu-2core with `python -m hardware_profiles.data.fit`."""
