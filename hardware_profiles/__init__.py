"""Machine types, one YAML each. Regenerate all but cpu-2core with `python -m mopsim.fit_profiles`."""
