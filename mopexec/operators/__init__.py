"""Operators as pairs of a forward and a backward on plain tensors: no autograd graph, no module, no schedule.

One file a mechanism. `flat` calls the pairs in the order of its schedule, `modules` wraps them in
autograd.Functions, and the modules of `model` compute by their forwards.
"""
