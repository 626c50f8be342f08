"""How long a test waits for other processes. A guard against what never ends, far above what a loaded machine
takes: no test passes or fails by the clock."""

HANG = 3600.0
"""Seconds."""
