"""Operators as pairs of a forward and a backward without an autograd graph, line by line as mopexec.flat runs
them (docs/flat-units.md), and what its flat units do otherwise than other software.

All memory moves on the compute stream, in the order in which the executor's host thread issues it.
"""
