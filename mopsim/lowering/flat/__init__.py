"""The `flat_units` schedule with full recompute, line by line as mopexec.flat runs it (DESIGN.md).

All memory moves on the compute stream, in the order in which the executor's host thread issues it.
"""
